"""How much a wrong answer can get from the rewards. Imports no torch."""
