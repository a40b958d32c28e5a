"""What is remembered: ledger, blobs, releases, backups."""
