// The Hopper attention kernels' source in emulation against f64 formulas, over head dims, ragged sequences and groups, outputs NaN
// before. Prints one line a case; exits 1 when one is outside its bound (attention_oracle.h).
#include "../../kernels/attention_hopper_backward.cu"
#include "../../kernels/attention_hopper_forward.cu"
#include "attention_oracle.h"

// A matrix [tokens, heads, dim] in boxes of 64 dims of one head of `rows` tokens.
static TensorMap map_of(const void* matrix, int dim, int heads, int tokens, int rows) {
    auto bytes = [](int elements) { return (uint64_t)elements * 2; };
    return emulate::encode({(uint64_t)matrix, {(uint64_t)dim, (uint64_t)heads, (uint64_t)tokens}, {bytes(dim), bytes(dim * heads)},
                            {64, 1, (uint32_t)rows}});
}

// Tiles of `rows` rows of whole sequences.
static std::vector<Tile> tiles_of(const Case& c, int rows) {
    std::vector<Tile> tiles;
    for (size_t s = 0; s + 1 < c.starts.size(); s++)
        for (int row = 0; row < c.starts[s + 1] - c.starts[s]; row += rows)
            tiles.push_back({c.starts[s], c.starts[s + 1] - c.starts[s], row});
    return tiles;
}

// From out and lse as the forward kernel left them; keys' gradients in as many parts as are asked for.
static void run_backward(const Case& c, const std::string& name, const std::vector<float>& qkv, const std::vector<bf16>& qkv_t,
                         const std::vector<bf16>& out, const std::vector<float>& lse, int n_parts) {
    int d = c.dim, a = c.heads(), t = c.tokens(), g = c.groups, heads = g * (c.per_kv + 2);
    float scale = 1.0f / std::sqrt((float)d);
    auto dout = random_values((size_t)t * a * d);
    auto dout_t = stored<bf16>(dout);
    std::vector<bf16> dqkv(qkv.size(), {0x7fff});
    std::vector<float> delta((size_t)a * t, 0.0f), partial(n_parts > 1 ? (size_t)n_parts * t * g * 2 * d : 0, NAN);
    for (int head = 0; head < a; head++)
        for (int row = 0; row < t; row++)
            for (int i = 0; i < d; i++) {
                size_t at = ((size_t)row * a + head) * d + i;
                delta[(size_t)head * t + row] += to_float(dout_t[at]) * to_float(out[at]);
            }
    int dq_keys = d == 64 ? 128 : d == 128 ? 96 : 80, keys = d == 192 ? 64 : 128, queries = d == 128 ? 64 : 96;
    auto of_qkv = [&](int rows) { return map_of(qkv_t.data(), d, heads, t, rows); };
    auto of_dout = [&](int rows) { return map_of(dout_t.data(), d, a, t, rows); };
    TensorMap dq_maps[] = {of_qkv(128), of_dout(128), of_qkv(dq_keys)}, dkv_maps[] = {of_qkv(keys), of_qkv(queries), of_dout(queries)};
    auto tiles = tiles_of(c, 128), key_tiles = tiles_of(c, keys);
    emulate::launch({a, (int)tiles.size(), 1}, 384, (256 + 4 * dq_keys) * d * 2 + 40 + 1024, [&] {
        auto kernel = d == 64 ? attention_hopper_dq_d64_bf16 : d == 128 ? attention_hopper_dq_d128_bf16 : attention_hopper_dq_d192_bf16;
        kernel(dqkv.data(), delta.data(), lse.data(), dq_maps[0], dq_maps[1], dq_maps[2], tiles.data(), t, c.per_kv, scale, nullptr, 0);
    });
    size_t bytes = (2 * keys + 4 * queries) * d * 2 + 4 * queries * 4 + 40 + 1024;
    emulate::launch({g * n_parts, (int)key_tiles.size(), 1}, 384, bytes, [&] {
        auto kernel = d == 64 ? attention_hopper_dkv_d64_bf16 : d == 128 ? attention_hopper_dkv_d128_bf16 : attention_hopper_dkv_d192_bf16;
        kernel(dqkv.data(), partial.data(), delta.data(), lse.data(), dkv_maps[0], dkv_maps[1], dkv_maps[2], key_tiles.data(), t, c.per_kv,
               n_parts, scale, nullptr, 0);
    });
    if (n_parts > 1)
        emulate::launch({(t * g * 2 * d / 4 + 255) / 256, 1, 1}, 256, 16, [&] {
            attention_hopper_combine_bf16(dqkv.data(), partial.data(), t, c.per_kv, g, n_parts, d, nullptr, 0);
        });
    check_backward<bf16>(c, name + " parts=" + std::to_string(n_parts), qkv, dout, out, dqkv);
}

static void run(const Case& c, int n_parts) {
    int d = c.dim, a = c.heads(), t = c.tokens();
    float scale = 1.0f / std::sqrt((float)d);
    std::string name = "D=" + std::to_string(d) + " A/G=" + std::to_string(c.per_kv) + " T=" + std::to_string(t);
    auto qkv = random_values((size_t)t * c.columns());
    auto qkv_t = stored<bf16>(qkv);
    Oracle exact(c, qkv);

    std::vector<bf16> out((size_t)t * a * d, {0x7fff});
    std::vector<float> lse((size_t)a * t, NAN);
    int rows = d == 64 ? 192 : 128, keys = d == 192 ? 112 : 128;
    auto tiles = tiles_of(c, rows);
    int heads = c.groups * (c.per_kv + 2);
    TensorMap of_queries = map_of(qkv_t.data(), d, heads, t, rows), of_keys = map_of(qkv_t.data(), d, heads, t, keys);
    size_t bytes = (rows + 4 * keys) * d * 2 + 72 + 1024;
    emulate::launch({a, (int)tiles.size(), 1}, d == 64 ? 512 : 384, bytes, [&] {
        auto kernel = d == 64 ? attention_hopper_d64_bf16 : d == 128 ? attention_hopper_d128_bf16 : attention_hopper_d192_bf16;
        kernel(out.data(), lse.data(), of_queries, of_keys, tiles.data(), t, c.per_kv, scale);
    });
    check_forward<bf16>(c, name, exact, out, lse);
    run_backward(c, name, qkv, qkv_t, out, lse, n_parts);
}

int main() {
    noise.seed(20240617);
    for (int dim : {64, 128, 192}) {
        run({dim, 1, 2, {0, 1, 70, 83, 216}}, 1);
        run({dim, 3, 2, {0, 129, 129, 257}}, 2);
        run({dim, 4, 1, {0, 5, 700}}, 1);
        run({dim, 12, 1, {0, 200}}, 5);
    }
    return failures > 0;
}
