"""KV compaction: keep the tokens that matter for each key/value head, and free the other pages.

    scores.py      how much each key matters           score_key_norm, score_window_attention, ...
    selection.py   which tokens each head keeps        select_top, adaptive_budgets
    op.py          those tokens moved to pages         compact_kv, read_pages
                   of their own
    reference.py   the definition of all three, as loops

    k, v = read_pages(cache, table)                    # or straight from the prefill
    scores = score_window_attention(q_window, k, lengths=table.lengths)
    kept = select_top(scores, adaptive_budgets(scores, total), lengths=table.lengths)
    compacted = compact_kv(cache, table, kept, pool)
    for pages in pages_of(table, cache):
        pool.free(pages)                               # now other requests can have them

Heads may keep different numbers of tokens. A page of the compacted cache belongs to one head, and
each (request, head) has a row of its own in the block table, so attention needs nothing new: r
requests of kv heads are r * kv requests of one head.

    q = rearrange(q, "r (kv g) d -> (r kv) g d", kv=kv)
    out = decode_paged(q, compacted.cache, compacted.table)
    out = rearrange(out, "(r kv) g d -> r (kv g) d", kv=kv)
"""
