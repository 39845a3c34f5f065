"""What passes and runtime may both know: facts about a graph, its nodes, and weights as matrices."""
