"""What the manual has beside the pages of docs/: pages of other folders, and the two references."""
