"""Load generator and benchmarks. Nothing here is part of the product or imported by it."""
