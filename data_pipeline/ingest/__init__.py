"""Raw rows from tables, tars and folders, cut into chunks that are known before work starts."""
