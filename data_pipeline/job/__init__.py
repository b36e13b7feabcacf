"""The preprocess job: stage, select, write and commit, with the fate of every row."""
