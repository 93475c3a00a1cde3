// cuBLASLt, of stand_in.c: products by plain loops.
// The products: of f32 (type 0), bf16 and E4M3 (28).
enum { BF16 = 14 };
typedef struct { int type; Address rows, columns; long long stride; } Layout;
typedef struct { int first_transposed, second_transposed;  int first_by_rows, second_by_rows; float *first_scale, *second_scale; } Product;
int cublasLtCreate(void** handle) { *handle = &live; return 0; }
int cublasLtDestroy(void* handle) { return 0; }
int cublasLtMatrixLayoutCreate(Layout** layout, int type, Address rows, Address columns, long long stride) {
    *layout = malloc(sizeof(Layout));
    **layout = (Layout){type, rows, columns, stride};
    return rows && columns && stride >= (long long)rows ? 0 : 7;
}
// 68: f32 without TF32.
int cublasLtMatmulDescCreate(Product** product, int compute, int scale) {
    *product = calloc(1, sizeof(Product));
    return compute == 68 && scale == 0 ? 0 : 7;
}
int cublasLtMatmulDescSetAttribute(Product* product, int attribute, const void* value, size_t bytes) {
    if (attribute == 17 || attribute == 18) {
        *(attribute == 17 ? &product->first_scale : &product->second_scale) = *(float**)value;
        return bytes == 8 ? 0 : 7;
    }
    if (attribute == 31 || attribute == 32) { // 3: a scale for each row as we store it
        *(attribute == 31 ? &product->first_by_rows : &product->second_by_rows) = 1;
        return bytes == 4 && *(int*)value == 3 ? 0 : 7;
    }
    *(attribute == 3 ? &product->first_transposed : &product->second_transposed) = *(int*)value;
    return bytes == 4 && (attribute == 3 || attribute == 4) ? 0 : 7;
}
// Attribute 3: which ways of adding up parts of sums are allowed.
typedef struct { unsigned schemes; } Preference;
int cublasLtMatmulPreferenceCreate(Preference** preference) { *preference = malloc(sizeof **preference); (*preference)->schemes = 7; return 0; }
int cublasLtMatmulPreferenceSetAttribute(Preference* preference, int attribute, const void* value, size_t bytes) {
    if (attribute == 3) preference->schemes = *(unsigned*)value;
    return bytes == (attribute == 1 ? 8 : 4) ? 0 : 7;
}
int cublasLtMatmulPreferenceDestroy(Preference* preference) { free(preference); return 0; }
size_t cublasLtGetVersion(void) { const char* version = getenv("STAND_IN_VERSION"); return version ? atoi(version) : 130000; }
// Algorithms 1, 2 and 3 take so long, the first products longer, for the GPU wakes; 2 adds up parts.
static const float takes_ms[] = {0, 7, 3, 5}, wakes_ms = 20;
enum { WAKING = 5 };
static int n_products;
typedef struct { Address algorithm[8]; size_t workspace; int status; float waves; int reserved[4]; } Result;
int cublasLtMatmulAlgoGetHeuristic(void* handle, Product* product, Layout* a, Layout* b, Layout* c, Layout* d, Preference* preference,
                                   int wanted, Result* result, int* n) {
    TELL("algorithms proposed, parts of sums %s\n", preference->schemes ? "allowed" : "not allowed");
    *n = 0;
    for (Address i = 1; i <= 3 && *n < wanted; i++)
        if (i != 2 || preference->schemes) result[(*n)++] = (Result){{i}};
    return 0;
}
int cublasLtMatmulAlgoCheck(void* handle, Product* product, Layout* a, Layout* b, Layout* c, Layout* d, Address* algorithm, Result* result) {
    *result = (Result){{*algorithm}};
    return *algorithm >= 1 && *algorithm <= 3 ? 0 : 7;
}
static float element(const void* matrix, const Layout* layout, int transposed, size_t i, size_t j) {
    size_t at = transposed ? j + i * layout->stride : i + j * layout->stride;
    if (layout->type == 28) { // E4M3
        int code = ((const unsigned char*)matrix)[at], exponent = code >> 3 & 15, mantissa = code & 7;
        double size = exponent ? (8 + mantissa) * (double)(1 << exponent) / 1024 : mantissa / 512.0;
        return code & 128 ? -size : size;
    }
    return widened(matrix, at, layout->type == BF16);
}
typedef struct {
    Product product;
    Layout la, lb, ld;
    const void *a, *b;
    void* d;
    const void* c;
    float alpha, beta;
    int algorithm;
} Gemm;
static void gemm(void* data) {
    Gemm* g = data;
    take(takes_ms[g->algorithm] + (n_products++ < WAKING ? wakes_ms : 0));
    size_t k = g->product.first_transposed ? g->la.rows : g->la.columns;
    int is_bf16 = g->ld.type == BF16;
    // As large as those whose rate is measured, which nobody reads.
    if (g->ld.rows * g->ld.columns * k >= 1ull << 30) { usleep(3000); return; }
    for (size_t i = 0; i < g->ld.rows; i++)
        for (size_t j = 0; j < g->ld.columns; j++) {
            float sum = 0, from = widened(g->c, i + j * g->ld.stride, is_bf16);
            for (size_t l = 0; l < k; l++)
                sum += element(g->a, &g->la, g->product.first_transposed, i, l) * element(g->b, &g->lb, g->product.second_transposed, l, j);
            if (g->product.first_scale) sum *= g->product.first_scale[g->product.first_by_rows ? i : 0];
            if (g->product.second_scale) sum *= g->product.second_scale[g->product.second_by_rows ? j : 0];
            store(g->d, i + j * g->ld.stride, g->alpha * sum + (g->beta == 0 ? 0 : g->beta * from), is_bf16);
        }
}
int cublasLtMatmul(void* handle, Product* product, const float* alpha, const void* a, Layout* la, const void* b, Layout* lb,
                   const float* beta, const void* c, Layout* lc, void* d, Layout* ld, Address* algorithm, void* workspace, size_t bytes, Stream* stream) {
    if (failing()) return 13;
    if (c == d) TELL("product by algorithm %d\n", (int)*algorithm);
    int is_fp8 = la->type == 28; // whose operands have one form, sizes and scales
    if (is_fp8 && (lb->type != 28 || !product->first_transposed || product->second_transposed || la->rows % 16 || la->columns % 16 ||
                   !product->first_scale || !product->second_scale || product->first_by_rows != product->second_by_rows)) return 7;
    if (ld->type != 0 && (ld->type != BF16 || la->type == 0) || lc != ld || !workspace || (Address)workspace % 256) return 7;
    Gemm g = {*product, *la, *lb, *ld, a, b, d, c, *alpha, *beta, *algorithm};
    ask(stream, gemm, &g, sizeof g);
    return 0;
}
