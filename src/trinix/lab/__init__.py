"""The laboratory: correctness first, then four clocks, then the limit of the card."""
