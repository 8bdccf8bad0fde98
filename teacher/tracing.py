"""Graphs of a network: torch.fx traces it symbolically, and TorchScript compiles the graph that fx made."""

import torch
from torch import Tensor, fx, nn


def is_traced(values: Tensor) -> bool:
    """Whether a graph is being recorded, for inputs of any size, rather than values computed."""
    return isinstance(values, fx.Proxy) or torch.compiler.is_exporting()


class Scriptable(nn.Module):
    """A network that `torch.jit.script` compiles from its graph, as its source holds more than TorchScript knows."""

    def __prepare_scriptable__(self) -> fx.GraphModule:
        """Returns the network as a graph of torch's own operators, with the inputs that it uses; torch calls this."""
        graph = fx.Tracer().trace(self)
        for node in graph.nodes:
            if node.op == "placeholder" and not node.users:
                graph.erase_node(node)
        return fx.GraphModule(self, graph)
