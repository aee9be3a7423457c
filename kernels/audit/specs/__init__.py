"""What is audited: for each op, every row of its tile tables."""
