// The Hopper attention kernels' source in emulation against f64 formulas, over head dims, ragged sequences and groups, outputs NaN
// before. Prints one line a case; exits 1 when one is outside its bound (attention_oracle.h).
#include "../../kernels/attention_hopper_forward.cu"
#include "attention_oracle.h"

// A matrix [tokens, heads, dim] in boxes of 64 dims of one head of `rows` tokens.
static TensorMap map_of(const void* matrix, int dim, int heads, int tokens, int rows) {
    auto bytes = [](int elements) { return (uint64_t)elements * 2; };
    return emulate::encode({(uint64_t)matrix, {(uint64_t)dim, (uint64_t)heads, (uint64_t)tokens}, {bytes(dim), bytes(dim * heads)},
                            {64, 1, (uint32_t)rows}});
}

static void run(const Case& c) {
    int d = c.dim, a = c.heads(), t = c.tokens();
    float scale = 1.0f / std::sqrt((float)d);
    std::string name = "D=" + std::to_string(d) + " A/G=" + std::to_string(c.per_kv) + " T=" + std::to_string(t);
    auto qkv = random_values((size_t)t * c.columns());
    auto qkv_t = stored<bf16>(qkv);
    Oracle exact(c, qkv);

    std::vector<bf16> out((size_t)t * a * d, {0x7fff});
    std::vector<float> lse((size_t)a * t, NAN);
    std::vector<ForwardTile> tiles;
    int rows = d == 64 ? 192 : 128, keys = d == 192 ? 112 : 128;
    for (size_t s = 0; s + 1 < c.starts.size(); s++)
        for (int row = 0; row < c.starts[s + 1] - c.starts[s]; row += rows)
            tiles.push_back({c.starts[s], c.starts[s + 1] - c.starts[s], row});
    int heads = c.groups * (c.per_kv + 2);
    TensorMap of_queries = map_of(qkv_t.data(), d, heads, t, rows), of_keys = map_of(qkv_t.data(), d, heads, t, keys);
    size_t bytes = (rows + 4 * keys) * d * 2 + 2048;
    emulate::launch({a, (int)tiles.size(), 1}, d == 64 ? 512 : 384, bytes, [&] {
        auto kernel = d == 64 ? attention_hopper_d64_bf16 : d == 128 ? attention_hopper_d128_bf16 : attention_hopper_d192_bf16;
        kernel(out.data(), lse.data(), of_queries, of_keys, tiles.data(), t, c.per_kv, scale);
    });
    check_forward<bf16>(c, name, exact, out, lse);
}

int main() {
    noise.seed(20240617);
    for (int dim : {64, 128, 192}) {
        run({dim, 1, 2, {0, 1, 70, 83, 216}});
        run({dim, 3, 2, {0, 129, 129, 257}});
        run({dim, 6, 1, {0, 5, 900}});
        run({dim, 12, 1, {0, 200}});
    }
    return failures > 0;
}
