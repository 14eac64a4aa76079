"""Graph passes: one module a concept, each with its computations and the fusions cut from them."""
