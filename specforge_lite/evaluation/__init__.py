"""How good a draft is: tables, curves over checkpoints, errors, and estimated beside decoded acceptance."""
