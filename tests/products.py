"""What kernels hold of their products of matrices."""


def bytes_of_products(jaxpr):
    """Yields the bytes of both factors of every product of matrices in a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield sum(x.aval.size * x.aval.dtype.itemsize for x in equation.invars)
        for value in equation.params.values():
            if inner := getattr(value, "jaxpr", value if hasattr(value, "eqns") else None):
                yield from bytes_of_products(inner)
