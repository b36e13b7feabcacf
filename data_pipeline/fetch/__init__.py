"""Images from the web: polite, guarded, bounded."""
