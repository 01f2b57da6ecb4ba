"""Layer 0: records that are pytrees, the axis glossary, atomic files. Imports nothing of the package."""
