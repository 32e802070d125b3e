"""Artifacts: the folders that stages write and read, each complete only when its manifest is there."""
