"""Networks: built, given their weights, trained where they come without, and brought into canonical form."""
