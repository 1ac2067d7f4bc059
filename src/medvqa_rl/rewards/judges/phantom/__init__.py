"""The embedded judge that sees phantom images."""
