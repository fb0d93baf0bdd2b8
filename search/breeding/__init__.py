"""How children are made: the primitive set, variation, and canonical form."""
