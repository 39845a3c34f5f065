"""What a person gets to see: reports, printed graphs, drawings, pages. Nothing that is compiled depends on it."""
