"""How the embedded model (fisherfunc/assets) was trained."""
