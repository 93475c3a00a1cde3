// The f64 formulas of attention for the programs that check its kernels in emulation (attention.cpp, attention_hopper.cpp), random
// inputs as a kernel's type stores them, and the bounds. Included after the kernels. Bounds, with u = 2^-8 the unit roundoff of
// bf16 (0 for f32) and e = 2^-24 of f32, n the length of the longest chain of f32 additions:
//   out:  weights are rounded to bf16 before the second product and the result at the store: u (sum p |v| + |out|); the f32 part
//         is (2n + 8 |score|max) e sum p |v|, the score's own error (n e |q||k| scale) growing a weight by that share.
//   dv:   as out with p |dout|; dq, dk: the same with |ds| |k| or |q|, plus the error of ds, whose terms |dp| and |delta| are sums.
#pragma once
#include <random>

static std::mt19937_64 noise;
static std::vector<float> random_values(size_t n) {
    std::normal_distribution<float> normal;
    std::vector<float> x(n);
    for (float& v : x) v = normal(noise);
    return x;
}
static bf16 narrow(float x, bf16*) { return {(unsigned short)round_bf16(x)}; }
static float narrow(float x, float*) { return x; }
template <class T> static std::vector<T> stored(std::vector<float>& x) {
    std::vector<T> to;
    for (float& v : x) {
        to.push_back(narrow(v, (T*)0));
        v = to_float(to.back());
    }
    return to;
}

static int failures = 0;
// Largest error as a share of its bound.
struct Check {
    const char* what;
    double worst = 0;
    void add(double got, double wanted, double bound) {
        double share = std::fabs(got - wanted) / bound;
        if (worst == worst && !(share <= worst)) worst = share; // NaN as well, which then stays
    }
    void end(const std::string& name) {
        bool good = worst <= 1.0;
        printf("%s %s %s: largest error is %.3f of the bound\n", good ? "ok" : "FAILED", name.c_str(), what, worst);
        failures += !good;
    }
};

struct Case {
    int dim, per_kv, groups;
    std::vector<int> starts;
    int columns() const { return groups * (per_kv + 2) * dim; }
    int heads() const { return groups * per_kv; }
    int tokens() const { return starts.back(); }
    int q_at(int head) const { return (head / per_kv * (per_kv + 2) + head % per_kv) * dim; }
    int k_at(int group) const { return (group * (per_kv + 2) + per_kv) * dim; }
};

// p of one query over keys 0..=last of rows from `start`.
static std::vector<double> weights(const Case& c, const std::vector<float>& qkv, int head, int row, int start, double* lse) {
    std::vector<double> s;
    double top = -1e300, sum = 0;
    for (int key = start; key <= row; key++) {
        double dot = 0;
        for (int i = 0; i < c.dim; i++)
            dot += (double)qkv[(size_t)row * c.columns() + c.q_at(head) + i] * qkv[(size_t)key * c.columns() + c.k_at(head / c.per_kv) + i];
        s.push_back(dot / std::sqrt((double)c.dim));
        top = max(top, s.back());
    }
    for (double x : s) sum += std::exp(x - top);
    *lse = top + std::log(sum);
    for (double& x : s) x = std::exp(x - *lse);
    return s;
}

// (row, head) -> exact out and sum p |v|.
struct Oracle {
    std::vector<double> out, size, lse;
    Oracle(const Case& c, const std::vector<float>& qkv) {
        int d = c.dim, a = c.heads(), t = c.tokens();
        out.assign((size_t)t * a * d, 0);
        size = out;
        lse.assign((size_t)a * t, 0);
        for (size_t s = 0; s + 1 < c.starts.size(); s++)
            for (int row = c.starts[s]; row < c.starts[s + 1]; row++)
                for (int head = 0; head < a; head++) {
                    auto p = weights(c, qkv, head, row, c.starts[s], &lse[(size_t)head * t + row]);
                    for (size_t key = 0; key < p.size(); key++)
                        for (int i = 0; i < d; i++) {
                            double v = qkv[(c.starts[s] + key) * c.columns() + c.k_at(head / c.per_kv) + d + i];
                            out[((size_t)row * a + head) * d + i] += p[key] * v;
                            size[((size_t)row * a + head) * d + i] += p[key] * std::fabs(v);
                        }
                }
    }
};

template <class T> constexpr bool is_bf16 = sizeof(T) == 2;
template <class T> constexpr double roundoff = is_bf16<T> ? 1.0 / 256 : 0;
constexpr double F32_ROUNDOFF = 1.0 / (1 << 24);
// Of sums in f32.
static double f32_share(const Case& c) {
    double n = c.dim + c.tokens() + 64;
    return (2 * n + 8 * 8) * F32_ROUNDOFF;
}

template <class T>
static void check_forward(const Case& c, const std::string& name, const Oracle& exact, const std::vector<T>& out,
                          const std::vector<float>& lse) {
    double u = roundoff<T>, e = F32_ROUNDOFF, f32 = f32_share(c);
    Check forward{"out"}, logs{"lse"};
    for (size_t i = 0; i < out.size(); i++)
        forward.add(to_float(out[i]), exact.out[i], u * (exact.size[i] + std::fabs(exact.out[i])) * 1.01 + f32 * exact.size[i] + e);
    for (size_t i = 0; i < lse.size(); i++) logs.add(lse[i], exact.lse[i], f32 * (1 + std::fabs(exact.lse[i])));
    forward.end(name);
    logs.end(name);
}

// From the out the backward kernel was given.
template <class T>
static void check_backward(const Case& c, const std::string& name, const std::vector<float>& qkv, const std::vector<float>& dout,
                           const std::vector<T>& out, const std::vector<T>& dqkv) {
    int d = c.dim, a = c.heads();
    double u = roundoff<T>, e = F32_ROUNDOFF, f32 = f32_share(c);
    float scale = 1.0f / std::sqrt((float)d);
    std::vector<double> want(qkv.size(), 0), size(qkv.size(), 0), slack(qkv.size(), 0);
    for (size_t s = 0; s + 1 < c.starts.size(); s++)
        for (int row = c.starts[s]; row < c.starts[s + 1]; row++)
            for (int head = 0; head < a; head++) {
                double ignored, dot = 0, dot_size = 0;
                auto p = weights(c, qkv, head, row, c.starts[s], &ignored);
                const float* dy = &dout[((size_t)row * a + head) * d];
                for (int i = 0; i < d; i++) {
                    double o = to_float(out[((size_t)row * a + head) * d + i]);
                    dot += dy[i] * o;
                    dot_size += std::fabs(dy[i] * o);
                }
                size_t q = (size_t)row * c.columns() + c.q_at(head);
                for (size_t j = 0; j < p.size(); j++) {
                    size_t k = (c.starts[s] + j) * c.columns() + c.k_at(head / c.per_kv);
                    double dp = 0, dp_size = 0;
                    for (int i = 0; i < d; i++) {
                        dp += dy[i] * qkv[k + d + i];
                        dp_size += std::fabs(dy[i] * qkv[k + d + i]);
                    }
                    double ds = p[j] * (dp - dot) * scale, error = f32 * p[j] * (dp_size + dot_size) * scale;
                    for (int i = 0; i < d; i++) {
                        auto add = [&](size_t at, double x, double with, double more) {
                            want[at] += x * with;
                            size[at] += std::fabs(x * with);
                            slack[at] += more * std::fabs(with);
                        };
                        add(q + i, ds, qkv[k + i], error);
                        add(k + i, ds, qkv[q + i], error);
                        add(k + d + i, p[j], dy[i], f32 * p[j]);
                    }
                }
            }
    Check backward{"dqkv"};
    for (size_t i = 0; i < want.size(); i++)
        backward.add(to_float(dqkv[i]), want[i], u * (size[i] + std::fabs(want[i])) * 1.01 + f32 * size[i] + slack[i] + e);
    backward.end(name);
}
