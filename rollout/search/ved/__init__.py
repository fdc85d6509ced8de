"""Value-guided efficient decoding (VED) of V-STAR."""
