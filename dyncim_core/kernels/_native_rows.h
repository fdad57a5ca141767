/* Loops over the classes of one row, compiled once for each instruction set by _native.c.
 *
 * They work on whole vectors; the end of a row is filled up with classes of probability 0. Sums
 * run over blocks, so that no float32 sum is long. */

static inline Floats FOR_TARGET(choose)(Ints mask, Floats a, Floats b) {
    return (Floats)(((Ints)a & mask) | ((Ints)b & ~mask));
}

static inline Floats FOR_TARGET(load)(const float *x) {
    Floats v;
    memcpy(&v, x, sizeof v);
    return v;
}

#ifdef MASKED /* what compilers make of vectors in general is slow in these five */

static inline Floats FOR_TARGET(load_end)(const float *x, int32_t count, float fill) {
    return (Floats)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), (__mmask16)((1u << count) - 1), x);
}

static inline void FOR_TARGET(store_end)(float *x, Floats v, int32_t count) {
    _mm512_mask_storeu_ps(x, (__mmask16)((1u << count) - 1), (__m512)v);
}

static inline Floats FOR_TARGET(larger)(Floats a, Floats b) {
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
}

static inline float FOR_TARGET(largest)(Floats v) { return _mm512_reduce_max_ps((__m512)v); }

static inline int32_t FOR_TARGET(least)(Ints v) { return _mm512_reduce_min_epi32((__m512i)v); }

#else

/* The end of a row, filled up. */
static inline Floats FOR_TARGET(load_end)(const float *x, int32_t count, float fill) {
    float v[LANES];
    for (int32_t k = 0; k < LANES; k++) v[k] = k < count ? x[k] : fill;
    return FOR_TARGET(load)(v);
}

static inline void FOR_TARGET(store_end)(float *x, Floats v, int32_t count) {
    for (int32_t k = 0; k < LANES; k++)
        if (k < count) x[k] = v[k];
}

/* b where either is NaN. */
static inline Floats FOR_TARGET(larger)(Floats a, Floats b) {
    return FOR_TARGET(choose)(a > b, a, b);
}

static inline float FOR_TARGET(largest)(Floats v) {
    Half a[2];
    Quarter b[2];
    memcpy(a, &v, sizeof v);
    for (int k = 0; k < LANES / 2; k++) a[0][k] = a[0][k] > a[1][k] ? a[0][k] : a[1][k];
    memcpy(b, a, sizeof b);
    for (int k = 0; k < LANES / 4; k++) b[0][k] = b[0][k] > b[1][k] ? b[0][k] : b[1][k];
    float even = b[0][0] > b[0][2] ? b[0][0] : b[0][2], odd = b[0][1] > b[0][3] ? b[0][1] : b[0][3];
    return even > odd ? even : odd;
}

static inline int32_t FOR_TARGET(least)(Ints v) {
    int32_t best = v[0];
    for (int k = 1; k < LANES; k++) best = v[k] < best ? v[k] : best;
    return best;
}

#endif

static inline float FOR_TARGET(sum)(Floats v) {
    Half a[2];
    Quarter b[2];
    memcpy(a, &v, sizeof v);
    a[0] += a[1];
    memcpy(b, a, sizeof b);
    b[0] += b[1];
    return (b[0][0] + b[0][2]) + (b[0][1] + b[0][3]);
}

/* exp(x) for x <= 0 to float32 rounding; 0 below the smallest normal number; NaN stays. */
static inline Floats FOR_TARGET(exp_nonpositive)(Floats x) {
    Ints tiny = x < -87.0f;
    Floats clamped = FOR_TARGET(larger)((Floats){0} - 87.0f, x);
    Floats n = (clamped * 1.44269504f + 12582912.0f) - 12582912.0f; /* to a whole number */
    Floats r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
    return (Floats)((Ints)(p * (Floats)power) & ~tiny);
}

/* log(x) for x >= 1 to float64 rounding; NaN stays. */
static inline Doubles FOR_TARGET(log)(Doubles x) {
    Longs bits = (Longs)x, power = (bits - 0x3fe6a09e667f3bcd) >> 52; /* of x * sqrt 2 */
    Doubles m = (Doubles)(bits - (power << 52)), f = (m - 1.0) / (m + 1.0), s = f * f;
    Doubles p = s / 19.0 + 1.0 / 17.0; /* of atanh */
    p = p * s + 1.0 / 15.0;
    p = p * s + 1.0 / 13.0;
    p = p * s + 1.0 / 11.0;
    p = p * s + 1.0 / 9.0;
    p = p * s + 1.0 / 7.0;
    p = p * s + 1.0 / 5.0;
    p = p * s + 1.0 / 3.0;
    p = p * s * f + f;
    return __builtin_convertvector(power, Doubles) * 0.693147180559945309 + 2.0 * p + (x - x);
}

typedef struct {
    Floats sum, weighted; /* of exp(d) and d exp(d) */
    Ints position, first; /* of the next lane; of the first lane where d is 0 */
} FOR_TARGET(Sums);

static inline Floats FOR_TARGET(take)(FOR_TARGET(Sums) *s, Floats d) {
    Ints is_first = (d == 0.0f) & (s->first == INT32_MAX);
    s->first = (s->position & is_first) | (s->first & ~is_first);
    s->position += LANES;
    Floats exponential = FOR_TARGET(exp_nonpositive)(d);
    s->sum += exponential;
    /* 0 log 0 is 0, also for a logit of -inf */
    s->weighted += exponential * FOR_TARGET(larger)((Floats){0} - 88.0f, d);
    return exponential;
}

ALWAYS_INLINE Floats FOR_TARGET(highest)(const float *x, int64_t whole, int32_t left) {
    Floats highest = FOR_TARGET(load_end)(x + whole, left, -INFINITY);
    for (int64_t c = 0; c < whole; c += LANES)
        highest = FOR_TARGET(larger)(FOR_TARGET(load)(x + c), highest);
    return highest;
}

ALWAYS_INLINE FOR_TARGET(Sums) FOR_TARGET(exponentials)(const float *restrict x, float top,
                                                        int64_t whole, int32_t left,
                                                        float *restrict e) {
    Floats sum = {0}, weighted = {0};
    FOR_TARGET(Sums) s = {{0}, {0}, COUNT_UP, (Ints){0} + INT32_MAX};
    for (int64_t start = 0; start < whole; start += BLOCK) {
        int64_t stop = start + BLOCK < whole ? start + BLOCK : whole;
        for (int64_t c = start; c < stop; c += LANES) {
            Floats v = FOR_TARGET(take)(&s, FOR_TARGET(load)(x + c) - top);
            memcpy(e + c, &v, sizeof v);
        }
        sum += s.sum;
        weighted += s.weighted;
        s.sum = s.weighted = (Floats){0};
    }
    if (left) {
        Floats end = FOR_TARGET(load_end)(x + whole, left, -INFINITY) - top;
        FOR_TARGET(store_end)(e + whole, FOR_TARGET(take)(&s, end), left);
    }
    s.sum += sum;
    s.weighted += weighted;
    return s;
}

/* Softmaxes of rows, not yet divided by their sums, into e. Each step takes all rows before the
 * next, so that a processor has several in hand. */
static void FOR_TARGET(softmax_rows)(const float *x, int64_t stride, int64_t rows,
                                     int64_t classes, float *e, int64_t e_stride,
                                     Softmaxes *found) {
    int64_t whole = classes / LANES * LANES;
    int32_t left = (int32_t)(classes - whole);
    FOR_TARGET(Sums) sums[ROWS];
    for (int64_t r = 0; r < rows; r++)
        found->max[r] = FOR_TARGET(largest)(FOR_TARGET(highest)(x + r * stride, whole, left));
    for (int64_t r = 0; r < rows; r++)
        sums[r] = FOR_TARGET(exponentials)(x + r * stride, found->max[r], whole, left,
                                           e + r * e_stride);
    for (int64_t r = 0; r < rows; r++) {
        int32_t best = FOR_TARGET(least)(sums[r].first);
        found->argmax[r] = best == INT32_MAX ? 0 : best; /* not finite: anything will do */
        found->total[r] = FOR_TARGET(sum)(sums[r].sum);
        found->weighted[r] = FOR_TARGET(sum)(sums[r].weighted);
    }
    for (int64_t r = rows; r < ROWS; r++) found->total[r] = found->weighted[r] = 1.0f;
    for (int64_t r = 0; r < ROWS; r += LANES / 2) {
        Half totals, weighted;
        memcpy(&totals, found->total + r, sizeof totals);
        memcpy(&weighted, found->weighted + r, sizeof weighted);
        Half inverse = 1.0f / totals;
        memcpy(found->inverse_total + r, &inverse, sizeof inverse);
        Doubles total = __builtin_convertvector(totals, Doubles), log = FOR_TARGET(log)(total);
        memcpy(found->log_total + r, &log, sizeof log);
        Doubles entropy = log - __builtin_convertvector(weighted, Doubles) / total;
        memcpy(found->entropy + r, &entropy, sizeof entropy);
    }
}

/* e_c = factor * e_c - even * weight_c, with weights of 1 when NULL, of each row; without `even`
 * that is 0. */
static void FOR_TARGET(scale_rows)(float *restrict e, int64_t rows, int64_t classes,
                                   const float *restrict factor, const float *restrict even,
                                   const float *restrict weight) {
    int64_t whole = classes / LANES * LANES;
    int32_t left = (int32_t)(classes - whole);
    for (int64_t r = 0; r < rows; r++, e += classes) {
        Floats less = (Floats){0} + (even ? even[r] : 0.0f), v;
        for (int64_t c = 0; c < whole; c += LANES) {
            if (weight) less = FOR_TARGET(load)(weight + c) * even[r];
            v = FOR_TARGET(load)(e + c) * factor[r] - less;
            memcpy(e + c, &v, sizeof v);
        }
        if (!left) continue;
        if (weight) less = FOR_TARGET(load_end)(weight + whole, left, 0.0f) * even[r];
        v = FOR_TARGET(load_end)(e + whole, left, 0.0f) * factor[r] - less;
        FOR_TARGET(store_end)(e + whole, v, left);
    }
}

/* Of each row, divided by its sum: sum_c (e_c - p_c)^2. */
static void FOR_TARGET(distance_rows)(float *restrict e, const float *restrict p, int64_t stride,
                                      int64_t rows, int64_t classes, const float *factor,
                                      float *squared) {
    int64_t whole = classes / LANES * LANES;
    int32_t left = (int32_t)(classes - whole);
    for (int64_t r = 0; r < rows; r++, e += stride, p += stride) {
        Floats sum = {0};
        for (int64_t start = 0; start < whole; start += BLOCK) {
            int64_t stop = start + BLOCK < whole ? start + BLOCK : whole;
            Floats s = {0};
            for (int64_t c = start; c < stop; c += LANES) {
                Floats v = FOR_TARGET(load)(e + c) * factor[r], d = v - FOR_TARGET(load)(p + c);
                memcpy(e + c, &v, sizeof v);
                s += d * d;
            }
            sum += s;
        }
        if (left) {
            Floats v = FOR_TARGET(load_end)(e + whole, left, 0.0f) * factor[r];
            Floats d = v - FOR_TARGET(load_end)(p + whole, left, 0.0f);
            FOR_TARGET(store_end)(e + whole, v, left);
            sum += d * d;
        }
        squared[r] = FOR_TARGET(sum)(sum);
    }
}

/* Of modality m: ||p_m - consensus||^2 / 2 * max_c consensus_c, where the consensus of the
 * others is their mean under the given weights, of sum 1. Rows are padded. */
static double FOR_TARGET(contradiction)(const float *restrict probs, int64_t stride,
                                        int64_t modalities, int64_t m,
                                        const float *restrict share, int64_t classes) {
    Floats sum = {0}, highest = {0};
    for (int64_t c = 0; c < classes; c += LANES) {
        Floats consensus = {0};
        for (int64_t k = 0; k < modalities; k++)
            if (k != m && share[k] > 0.0f)
                consensus += FOR_TARGET(load)(probs + k * stride + c) * share[k];
        Floats d = FOR_TARGET(load)(probs + m * stride + c) - consensus;
        sum += d * d;
        highest = FOR_TARGET(larger)(consensus, highest);
    }
    double found = FOR_TARGET(sum)(sum) / 2.0 * FOR_TARGET(largest)(highest);
    return found < 1.0 ? found : 1.0;
}

/* sum_c weight_c * (x_c - shift), with weights of 1 when NULL */
static double FOR_TARGET(weighted_sum)(const float *restrict x, double shift,
                                       const float *restrict weight, int64_t classes) {
    double sum = 0.0;
    for (int64_t start = 0; start < classes; start += BLOCK) {
        int64_t stop = start + BLOCK < classes ? start + BLOCK : classes;
        float s = 0.0f;
        for (int64_t c = start; c < stop; c++) s += (weight ? weight[c] : 1.0f) * (x[c] - (float)shift);
        sum += s;
    }
    return sum;
}

static inline Floats FOR_TARGET(gradient)(Floats x, float high, float low, float factor,
                                          Floats smooth) {
    return FOR_TARGET(exp_nonpositive)(x - high - low) * factor - smooth;
}

/* out_c = factor * exp(x_c - lse) - smooth * weight_c; lse in two parts, since float32 alone
 * would round away what decides. */
static void FOR_TARGET(gradient_row)(const float *restrict x, double lse, float factor,
                                     float smooth, const float *restrict weight, int64_t classes,
                                     float *restrict out) {
    int64_t whole = classes / LANES * LANES;
    float high = (float)lse, low = (float)(lse - high);
    Floats even = (Floats){0} + smooth, g;
    for (int64_t c = 0; c < whole; c += LANES) {
        if (weight) even = FOR_TARGET(load)(weight + c) * smooth;
        g = FOR_TARGET(gradient)(FOR_TARGET(load)(x + c), high, low, factor, even);
        memcpy(out + c, &g, sizeof g);
    }
    int32_t left = (int32_t)(classes - whole);
    if (weight) even = FOR_TARGET(load_end)(weight + whole, left, 0.0f) * smooth;
    g = FOR_TARGET(load_end)(x + whole, left, high);
    g = FOR_TARGET(gradient)(g, high, low, factor, even);
    FOR_TARGET(store_end)(out + whole, g, left);
}

/* exp of values <= 0, in place */
static void FOR_TARGET(exp_row)(float *x, int64_t count) {
    int64_t whole = count / LANES * LANES;
    for (int64_t c = 0; c < whole; c += LANES) {
        Floats v = FOR_TARGET(exp_nonpositive)(FOR_TARGET(load)(x + c));
        memcpy(x + c, &v, sizeof v);
    }
    int32_t left = (int32_t)(count - whole);
    Floats v = FOR_TARGET(exp_nonpositive)(FOR_TARGET(load_end)(x + whole, left, 0.0f));
    FOR_TARGET(store_end)(x + whole, v, left);
}

static const RowKernels FOR_TARGET(kernels) = {
    FOR_TARGET(softmax_rows), FOR_TARGET(scale_rows), FOR_TARGET(distance_rows),
    FOR_TARGET(weighted_sum), FOR_TARGET(gradient_row), FOR_TARGET(exp_row),
    FOR_TARGET(contradiction),
};
