"""Draft trees of EAGLE: building them from the chosen candidates, and greedy verification.

A tree of `size` nodes per request; node 0 is the last accepted token, node i > 0 is candidate selected[i - 1].
"""

import torch

QUERY_LENGTH_ONLY = 1


def build_tree_kernel_efficient_cpu(
    parents, selected, seq_lens, mask, positions, index, next_token, next_sibling, topk, depth, size, mask_mode
):
    """Fill, in place: `index` [B, size] flat node numbers, `next_token` first child, `next_sibling` (-1: none),
    `positions` [B * size], and the tree mask (ancestors and self; for mode 0 with the prefix in front)."""
    batch = parents.shape[0]
    index.copy_(torch.arange(batch * size).view_as(index))
    children, siblings, places, masks = [], [], [], []
    for request, length in enumerate(seq_lens.tolist()):
        parent = _parents(parents[request].tolist(), selected[request].tolist(), topk, size)
        first_child, sibling = [-1] * size, [-1] * size
        for node in range(size - 1, 0, -1):
            if parent[node] >= 0:
                sibling[node] = first_child[parent[node]]
                first_child[parent[node]] = node
        ancestors = torch.zeros(size, size, dtype=torch.bool)
        for node in range(size):
            level, walk = 0, node
            while walk > 0:
                ancestors[node, walk] = True
                walk = parent[walk]
                level += 1
            ancestors[node, 0] = True
            places.append(length + level)
        children.append(first_child)
        siblings.append(sibling)
        masks.append(ancestors)
    next_token.copy_(torch.tensor(children).view_as(next_token))
    next_sibling.copy_(torch.tensor(siblings).view_as(next_sibling))
    positions[: batch * size] = torch.tensor(places, dtype=positions.dtype)
    _write_masks(mask.view(-1), masks, seq_lens.tolist(), size, mask_mode)


def _parents(parent_list, selected, topk, size):
    """Node number of each node's parent; candidates are numbered level by level, topk per expanded node."""
    node_of = {candidate: i + 1 for i, candidate in reversed(list(enumerate(selected)))}
    parent = [-1] * size
    for node in range(1, size):
        group = selected[node - 1] // topk
        parent[node] = 0 if group == 0 else node_of.get(parent_list[group], -1)
    return parent


def _write_masks(flat, masks, seq_lens, size, mask_mode):
    if mask_mode == QUERY_LENGTH_ONLY:
        flat[: len(masks) * size * size] = torch.stack(masks).view(-1)
        return
    offset = 0
    for ancestors, length in zip(masks, seq_lens):
        width = length + size
        flat[offset : offset + size * width].view(size, width)[:, length:] = ancestors
        offset += size * width


def verify_tree_greedy_cpu(
    predicts,
    accept_index,
    accept_token_num,
    candidates,
    retrive_index,
    retrive_next_token,
    retrive_next_sibling,
    target_predict,
):
    """Walk each tree along the target's own choices. Fills, in place: `predicts` (flat) the target's token after
    every accepted node, `accept_index` [B, steps + 1] the accepted nodes, `accept_token_num` [B] drafts accepted.
    Called by keyword, in sglang's spelling."""
    tokens, flat = candidates.tolist(), retrive_index.tolist()
    child, sibling = retrive_next_token.tolist(), retrive_next_sibling.tolist()
    target = target_predict.reshape(-1).tolist()
    most = accept_index.shape[1]
    for request in range(len(tokens)):
        node, last, accepted = 0, flat[request][0], 0
        accept_index[request, 0] = last
        while accepted + 1 < most:
            choice = child[request][node]
            while choice != -1 and tokens[request][choice] != target[last]:
                choice = sibling[request][choice]
            if choice == -1:
                break
            predicts[last] = target[last]
            accepted += 1
            node, last = choice, flat[request][choice]
            accept_index[request, accepted] = last
        accept_token_num[request] = accepted
        predicts[last] = target[last]
