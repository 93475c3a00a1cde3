// The attention kernels' source in emulation against f64 formulas, over head dims, ragged sequences and groups.
// Prints one line a case; exits 1 when one is outside its bound (attention_oracle.h).
#include "../../kernels/attention_forward.cu"
#include "../../kernels/attention_cached.cu"
#include "../../kernels/attention_backward.cu"
#include "attention_oracle.h"

static size_t mma_bytes(int tiles, int dim) { return (size_t)tiles * 64 * (dim + 8) * 2; }

template <class T> static void run(const Case& c) {
    int d = c.dim, a = c.heads(), t = c.tokens(), g = c.groups;
    bool mma = is_bf16<T> && (d == 64 || d == 128 || d == 192);
    double u = roundoff<T>, e = F32_ROUNDOFF, f32 = f32_share(c);
    float scale = 1.0f / std::sqrt((float)d);
    std::string name = std::string(is_bf16<T> ? "bf16" : "f32") + " D=" + std::to_string(d) + " A/G=" + std::to_string(c.per_kv);
    auto qkv = random_values((size_t)t * c.columns()), dout = random_values((size_t)t * a * d);
    auto qkv_t = stored<T>(qkv), dout_t = stored<T>(dout);
    Oracle exact(c, qkv);

    std::vector<T> out((size_t)t * a * d);
    std::vector<float> lse((size_t)a * t);
    std::vector<Item> items;
    int block = mma ? 64 : 16;
    for (size_t s = 0; s + 1 < c.starts.size(); s++) {
        int len = c.starts[s + 1] - c.starts[s];
        for (int row = 0; row < len * c.per_kv; row += block) items.push_back({c.starts[s], len, 0, row, 0, len, c.starts[s], -1});
    }
    Dim3 grid{(int)items.size(), g, 1};
    size_t fma_bytes = (16 * d + 32 * (d + 1) + 32 * d) * 4;
    emulate::launch(grid, 128, mma ? mma_bytes(5, d) : fma_bytes, [&] {
        if constexpr (is_bf16<T>) {
            if (d == 64) attention_d64_bf16(out.data(), lse.data(), qkv_t.data(), items.data(), t, c.per_kv, g, scale);
            else if (d == 128) attention_d128_bf16(out.data(), lse.data(), qkv_t.data(), items.data(), t, c.per_kv, g, scale);
            else if (d == 192) attention_d192_bf16(out.data(), lse.data(), qkv_t.data(), items.data(), t, c.per_kv, g, scale);
            else attention_bf16(out.data(), lse.data(), qkv_t.data(), items.data(), t, c.per_kv, g, d, scale);
        } else
            attention_f32(out.data(), lse.data(), qkv_t.data(), items.data(), t, c.per_kv, g, d, scale);
    });
    check_forward<T>(c, name, exact, out, lse);

    // Backward, from the out and lse the kernel was given.
    std::vector<T> dqkv(qkv.size());
    std::vector<float> delta((size_t)a * t);
    std::vector<Tile> tiles;
    for (size_t s = 0; s + 1 < c.starts.size(); s++)
        for (int row = 0; row < c.starts[s + 1] - c.starts[s]; row += block)
            tiles.push_back({c.starts[s], c.starts[s + 1] - c.starts[s], row});
    emulate::launch({(t * a + 15) / 16, 1, 1}, 128, 16, [&] {
        if constexpr (is_bf16<T>) attention_delta_bf16(delta.data(), dout_t.data(), out.data(), t, a, d);
        else attention_delta_f32(delta.data(), dout_t.data(), out.data(), t, a, d);
    });
    size_t fma_back = (32 * d + 64 * (d + 1)) * 4;
#define ARGS dqkv.data(), dout_t.data(), delta.data(), lse.data(), qkv_t.data(), tiles.data(), t, c.per_kv, g
#define PASS(pass, y, threads, bytes)                                                                                                \
    emulate::launch({(int)tiles.size(), y, 1}, mma ? threads : 128, mma ? (bytes) : fma_back, [&] {                                  \
        if constexpr (is_bf16<T>) {                                                                                                  \
            if (d == 64) attention_##pass##_d64_bf16(ARGS, scale);                                                                   \
            else if (d == 128) attention_##pass##_d128_bf16(ARGS, scale);                                                            \
            else if (d == 192) attention_##pass##_d192_bf16(ARGS, scale);                                                            \
            else attention_##pass##_bf16(ARGS, d, scale);                                                                            \
        } else                                                                                                                       \
            attention_##pass##_f32(ARGS, d, scale);                                                                                  \
    })
    PASS(dq, a, 128, mma_bytes(6, d));
    PASS(dkv, g, 256, mma_bytes(6, d) + 2 * 64 * 72 * 2);
    check_backward<T>(c, name, qkv, dout, out, dqkv);

    // Cached: the first half of each sequence is there already, its last tokens now; shares of `share` keys. Pages lie in any order,
    // NaN where nobody wrote.
    int sequences = c.starts.size() - 1, share = mma ? 64 : 32, n_partial = 0;
    auto tokens_of = [&](int s) { return c.starts[s + 1] - c.starts[s]; };
    auto pages_of = [&](int s) { return (tokens_of(s) + PAGE_TOKENS - 1) / PAGE_TOKENS; };
    std::vector<int> pages, first_page;
    for (int s = 0; s < sequences; s++) {
        first_page.push_back(pages.size());
        for (int i = 0; i < pages_of(s); i++) pages.push_back(pages.size());
    }
    std::shuffle(pages.begin(), pages.end(), noise);
    std::vector<T> keys(pages.size() * PAGE_TOKENS * g * d, narrow(NAN, (T*)0)), values = keys, cached(out.size());
    auto row_of = [&](int s, int i) { return pages[first_page[s] + i / PAGE_TOKENS] * PAGE_TOKENS + i % PAGE_TOKENS; };
    std::vector<int> tokens, old;
    std::vector<Item> cached_items;
    std::vector<Shares> shares_of;
    int n_counters = 0;
    for (int s = 0; s < sequences; s++) {
        int len = tokens_of(s), past = s % 2 ? len - 1 : len / 2, fresh = len - past;
        for (int i = 0; i < len; i++) {
            auto& to = i < past ? old : tokens;
            to.push_back(c.starts[s] + i);
            to.push_back(row_of(s, i));
        }
        for (int row = 0; row < fresh * c.per_kv; row += block) {
            int n_rows = min(block, fresh * c.per_kv - row), shares = (len + share - 1) / share;
            int first_partial = n_partial;
            for (int i = 0; i < shares; i++) {
                int end = min(len, (i + 1) * share);
                shares_of.push_back({shares, first_partial, n_counters});
                cached_items.push_back({c.starts[s] + past, fresh, past, row, i * share, end, first_page[s], shares > 1 ? n_partial : -1});
                if (shares > 1) n_partial += n_rows;
            }
            n_counters += shares > 1;
        }
    }
    for (auto* list : {&old, &tokens})
        emulate::launch({(int)list->size() / 2, 1, 1}, 128, 16, [&] {
            if constexpr (is_bf16<T>) attention_append_bf16(keys.data(), values.data(), qkv_t.data(), list->data(), c.per_kv, g, d);
            else attention_append_f32(keys.data(), values.data(), qkv_t.data(), list->data(), c.per_kv, g, d);
        });
    std::vector<float> partial((size_t)g * n_partial * d + 1), partial_lse((size_t)g * n_partial + 1);
    std::vector<unsigned> counters(n_counters * g + 1);
#define CACHE cached.data(), partial.data(), partial_lse.data(), qkv_t.data(), keys.data(), values.data(), pages.data(), cached_items.data(), shares_of.data(), counters.data(), n_partial, c.per_kv, g
    // Twice, with the blocks in another order: whose share is the last to be done changes no bit.
    auto attend = [&] {
        emulate::launch({(int)cached_items.size(), g, 1}, 128, mma ? mma_bytes(5, d) : fma_bytes, [&] {
            if constexpr (is_bf16<T>) {
                if (d == 64) attention_cached_d64_bf16(CACHE, scale);
                else if (d == 128) attention_cached_d128_bf16(CACHE, scale);
                else if (d == 192) attention_cached_d192_bf16(CACHE, scale);
                else attention_cached_bf16(CACHE, d, scale);
            } else
                attention_cached_f32(CACHE, d, scale);
        });
    };
    attend();
    auto first_time = cached;
    std::vector<int> order(cached_items.size());
    for (size_t i = 0; i < order.size(); i++) order[i] = i;
    std::shuffle(order.begin(), order.end(), noise);
    auto in_order = cached_items;
    auto in_order_too = shares_of;
    for (size_t i = 0; i < order.size(); i++) cached_items[i] = in_order[order[i]], shares_of[i] = in_order_too[order[i]];
    for (auto* of : {&partial, &partial_lse}) std::fill(of->begin(), of->end(), NAN);
    std::fill(cached.begin(), cached.end(), narrow(NAN, (T*)0));
    attend();
    for (size_t r = 0; r < tokens.size(); r += 2)
        if (memcmp(&cached[(size_t)tokens[r] * a * d], &first_time[(size_t)tokens[r] * a * d], a * d * sizeof(T))) {
            printf("FAILED %s: token %d has other bits when its shares are done in another order\n", name.c_str(), tokens[r]);
            failures++;
        }
    Check from_cache{"cached out"};
    for (size_t r = 0; r < tokens.size(); r += 2)
        for (size_t i = (size_t)tokens[r] * a * d; i < (size_t)(tokens[r] + 1) * a * d; i++)
            from_cache.add(to_float(cached[i]), exact.out[i], u * (exact.size[i] + std::fabs(exact.out[i])) * 1.01 + 2 * f32 * exact.size[i] + e);
    from_cache.end(name);
}

int main() {
    noise.seed(20240617);
    for (int dim : {64, 128, 192, 40})
        for (int per_kv : {1, 3}) {
            Case c{dim, per_kv, 2, {0, 1, 70, 83, 216}};
            run<bf16>(c);
            run<float>({dim, per_kv, 2, {0, 5, 38, 109}});
        }
    return failures > 0;
}
