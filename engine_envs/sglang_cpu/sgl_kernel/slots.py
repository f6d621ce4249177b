"""Tables that say where in the KV pool each token of each request lies.

B requests. `req_to_token` [requests, positions] holds pool slots; `req_indices` [B] names its rows.
"""

import ctypes

import torch


def _spans(start, end):
    """Row and column of every cell in the spans start[b] .. end[b], request after request."""
    start, lengths = start.long(), (end - start).long()
    rows = torch.repeat_interleave(torch.arange(lengths.numel()), lengths)
    before = torch.cumsum(lengths, 0) - lengths
    return rows, torch.arange(int(lengths.sum())) - before[rows] + start[rows]


def assign_req_to_token_pool_cpu(req_indices, req_to_token, start, end, slots, pool_len):
    """Write `slots` (all requests in a row) into the table at positions start .. end."""
    rows, columns = _spans(start, end)
    req_to_token[req_indices.long()[rows], columns] = slots[: rows.numel()].to(req_to_token.dtype)


def assign_extend_cache_locs_cpu(req_indices, req_to_token, start, end, out, pool_len):
    """Read the slots of positions start .. end into `out`, all requests in a row."""
    rows, columns = _spans(start, end)
    out[: rows.numel()] = req_to_token[req_indices.long()[rows], columns].to(out.dtype)


def assign_draft_cache_locs_contiguous_cpu(req_indices, req_to_token, seq_lens, out, pool_len, topk, steps):
    """Read the topk * steps slots that follow each request's tokens."""
    columns = seq_lens.long()[:, None] + torch.arange(topk * steps)[None]
    out.copy_(req_to_token[req_indices.long()[:, None], columns].reshape(-1).to(out.dtype))


def build_draft_decode_metadata_cpu(req_to_token, req_indices, seq_lens, topk, steps, pool_len):
    """One table row per (request, branch): its tokens, then the branch's own `steps` slots moved up behind them."""
    table = req_to_token[req_indices.long()].repeat_interleave(topk, 0).contiguous()
    lengths = seq_lens.long().repeat_interleave(topk)[:, None]
    branch = torch.arange(topk).repeat(req_indices.numel())[:, None]
    step = torch.arange(steps)[None]
    table.scatter_(1, lengths + step, table.gather(1, lengths + branch * steps + step))
    return table


def fill_bonus_tokens_cpu(tokens, accepted, out, stride):
    """The last accepted token of each request; tokens lie `stride` apart per request."""
    out.copy_(tokens.reshape(-1)[torch.arange(accepted.numel()) * stride + accepted.long() - 1])


def fill_accept_out_cache_loc_cpu(accept_index, slots, out, size=None):
    """Pool slots of the accepted draft tokens (entries of accept_index above -1), in order."""
    accepted = accept_index.reshape(-1)
    accepted = accepted[accepted > -1].long()
    out[: accepted.numel()] = slots[accepted]


def copy_all_layer_kv_cache_cpu(data_ptrs, strides, target, source):
    """Copy pool slots source -> target in every layer; buffers come as addresses and bytes per slot."""
    target, source = target.tolist(), source.tolist()
    for address, stride in zip(data_ptrs.tolist(), strides.tolist()):
        rows = [ctypes.string_at(address + slot * stride, stride) for slot in source]
        for slot, row in zip(target, rows):
            ctypes.memmove(address + slot * stride, row, stride)


def rotate_input_ids_cpu(ids, start, lengths, new_ids, select=None):
    """Shift each request's tokens left by one and put its new token last, or at `select`."""
    for request, (first, length) in enumerate(zip(start.tolist(), lengths.tolist())):
        if length > 1:
            ids[first : first + length - 1] = ids[first + 1 : first + length].clone()
        if length > 0:
            ids[int(select[request]) if select is not None else first + length - 1] = new_ids[request]
