"""The pure core: values and rules without I/O, clocks or threads."""
