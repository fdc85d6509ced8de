"""Value-guided efficient decoding (V-STAR)."""
