"""Every private name of torch that oasis_fx relies on: nothing else of ours imports one.

Read on torch 2.11, 2.13 and 2.14. A name that moved raises ImportError at the first use of the backend;
`oasis_fx.backend` turns that into plain Inductor with one warning. `distributed` and `tensors` are imported by the
runtime as well, so they must not load the compiler, which takes seconds.
"""
