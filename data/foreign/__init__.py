"""WebDataset tars of others: walked strictly, indexed where they are."""
