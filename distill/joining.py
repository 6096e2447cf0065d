"""A pass over compiled graphs: packed layers that read the same states become one product."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from slipstream.distill import packing

if TYPE_CHECKING:
    from torch.fx import Graph, Node


class JoinSiblings(CustomGraphPass):
    """Joins them, queries, keys and values, say: of SmolLM2's 211 products 121 are left.

    A call costs as much as reading a small weight does. The joined weights are held beside the others.
    """

    def __call__(self, graph: Graph) -> None:
        """Rewrite the graph."""
        readers: dict[Node, list[Node]] = {}
        for node in graph.find_nodes(op="call_function", target=torch.ops.slipstream.packed_linear.default):
            if node.args[2] is None:
                readers.setdefault(node.all_input_nodes[0], []).append(node)
        for nodes in readers.values():
            if len(nodes) > 1:
                self._join(graph, nodes)

    def _join(self, graph: Graph, nodes: list[Node]) -> None:
        x = nodes[0].all_input_nodes[0]  # it may be a part of what was joined before
        weights = [node.all_input_nodes[1] for node in nodes]
        values = [weight.meta["val"] for weight in weights]
        with graph.inserting_before(nodes[0]):
            joined = graph.call_function(torch.ops.slipstream.packed_linears.default, (x, weights))
            joined.meta["val"] = packing.like_packed_linears(x.meta["val"], values)
            last, start = joined.meta["val"].ndim - 1, 0
            for node, value in zip(nodes, values, strict=True):
                end = start + value.shape[0]
                part = graph.call_function(torch.ops.aten.slice.Tensor, (joined, last, start, end))
                part.meta["val"] = joined.meta["val"][..., start:end]
                node.replace_all_uses_with(part)
                start = end
        for node in nodes:
            graph.erase_node(node)

    def uuid(self) -> bytes:
        """What graphs kept on disk go by."""
        return get_hash_for_files((__file__, packing.__file__))
