/* Loops over the classes of one row, and over samples, compiled once for each instruction set by
 * _native.c.
 *
 * They work on whole vectors. What is left at the end of a row is the tail: the last vector of
 * the row, where it has one, whose first lanes whole vectors cover as well, else a part of one.
 * With AVX-512 it is always a part of one, but for what is written in place. Either is filled up
 * with classes of probability 0. Sums run over blocks, so that no float32 sum is long. */

#define Floats FOR_TARGET(Floats)
#define Ints FOR_TARGET(Ints)
#define Half FOR_TARGET(Half)
#define Doubles FOR_TARGET(Doubles)
#define Longs FOR_TARGET(Longs)

typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(LANES * sizeof(int32_t))));
typedef float Half __attribute__((vector_size(LANES / 2 * sizeof(float))));
typedef double Doubles __attribute__((vector_size(LANES / 2 * sizeof(double))));
typedef int64_t Longs __attribute__((vector_size(LANES / 2 * sizeof(int64_t))));

static inline Floats FOR_TARGET(choose)(Ints mask, Floats a, Floats b) {
    return (Floats)(((Ints)a & mask) | ((Ints)b & ~mask));
}

static inline Ints FOR_TARGET(lanes)(void) {
    Ints v;
    memcpy(&v, count_up, sizeof v);
    return v;
}

static inline Floats FOR_TARGET(load)(const float *x) {
    Floats v;
    memcpy(&v, x, sizeof v);
    return v;
}

/* A Place is where in a row a vector starts, or each of its lanes is; counted down from INT32_MAX,
 * so that the first is the largest, and 0 stands for none. */

#ifdef MASKED /* what compilers make of vectors in general is slow in these */

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

static inline float FOR_TARGET(sum)(Floats v) { return _mm512_reduce_add_ps((__m512)v); }

typedef int32_t FOR_TARGET(Place);

static inline int32_t FOR_TARGET(place)(int64_t c) { return INT32_MAX - (int32_t)c; }

static inline void FOR_TARGET(find_zero)(int32_t *first, int32_t place, Floats d) {
    uint32_t zeros = _mm512_cmpeq_ps_mask((__m512)d, _mm512_setzero_ps());
    int32_t at = zeros ? place - __builtin_ctz(zeros) : 0;
    *first = at > *first ? at : *first;
}

static inline int32_t FOR_TARGET(found)(int32_t first) { return INT32_MAX - first; }

#else

/* The end of a row, filled up. */
static inline Floats FOR_TARGET(load_end)(const float *x, int32_t count, float fill) {
#if LANES == 8
    Ints mask = FOR_TARGET(lanes)() < count;
    Floats found = (Floats)_mm256_maskload_ps(x, (__m256i)mask);
    return FOR_TARGET(choose)(mask, found, (Floats){0} + fill);
#else
    float v[LANES];
    for (int32_t k = 0; k < LANES; k++) v[k] = k < count ? x[k] : fill;
    return FOR_TARGET(load)(v);
#endif
}

static inline void FOR_TARGET(store_end)(float *x, Floats v, int32_t count) {
#if LANES == 8
    _mm256_maskstore_ps(x, (__m256i)(FOR_TARGET(lanes)() < count), (__m256)v);
#else
    for (int32_t k = 0; k < LANES; k++)
        if (k < count) x[k] = v[k];
#endif
}

/* b where either is NaN. */
static inline Floats FOR_TARGET(larger)(Floats a, Floats b) {
#if LANES == 8 /* what compilers do not see in the general form */
    return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return FOR_TARGET(choose)(a > b, a, b);
#endif
}

static inline float FOR_TARGET(largest)(Floats v) {
    float x[LANES];
    memcpy(x, &v, sizeof v);
    for (int half = LANES / 2; half; half /= 2)
        for (int k = 0; k < half; k++) x[k] = x[k] > x[k + half] ? x[k] : x[k + half];
    return x[0];
}

static inline float FOR_TARGET(sum)(Floats v) {
    float x[LANES];
    memcpy(x, &v, sizeof v);
    for (int half = LANES / 2; half; half /= 2)
        for (int k = 0; k < half; k++) x[k] += x[k + half];
    return x[0];
}

typedef Ints FOR_TARGET(Place);

static inline Ints FOR_TARGET(place)(int64_t c) {
    return INT32_MAX - (int32_t)c - FOR_TARGET(lanes)();
}

static inline void FOR_TARGET(find_zero)(Ints *first, Ints place, Floats d) {
    Ints at = place & (d == 0.0f);
#if LANES == 8
    *first = (Ints)_mm256_max_epi32((__m256i)at, (__m256i)*first);
#else
    *first = (Ints)FOR_TARGET(choose)(at > *first, (Floats)at, (Floats)*first);
#endif
}

static inline int32_t FOR_TARGET(found)(Ints first) {
    int32_t best = first[0];
    for (int k = 1; k < LANES; k++) best = first[k] > best ? first[k] : best;
    return INT32_MAX - best;
}

#endif

typedef struct {
    int64_t whole, last; /* where whole vectors end; where the last vector starts */
    int32_t left;        /* classes after whole vectors */
    Ints covered;        /* lanes of the last vector that whole vectors cover */
} FOR_TARGET(Shape);

ALWAYS_INLINE FOR_TARGET(Shape) FOR_TARGET(shape)(int64_t classes) {
    int32_t left = (int32_t)(classes % LANES);
    int64_t whole = classes - left;
    return (FOR_TARGET(Shape)){whole, whole ? classes - LANES : 0, left,
                               FOR_TARGET(lanes)() < (whole ? LANES - left : 0)};
}

ALWAYS_INLINE void FOR_TARGET(store)(float *x, Floats v) { memcpy(x, &v, sizeof v); }

/* In place: with what whole vectors cover, to be written back. */
ALWAYS_INLINE Floats FOR_TARGET(load_last)(const float *x, FOR_TARGET(Shape) s) {
    return s.whole ? FOR_TARGET(load)(x + s.last) : FOR_TARGET(load_end)(x, s.left, 0.0f);
}

ALWAYS_INLINE void FOR_TARGET(store_last)(float *x, Floats v, FOR_TARGET(Shape) s) {
    if (s.whole) FOR_TARGET(store)(x + s.last, v);
    else FOR_TARGET(store_end)(x, v, s.left);
}

#ifdef MASKED

#define TAIL(shape) (shape).whole /* where it starts */

ALWAYS_INLINE Floats FOR_TARGET(load_tail)(const float *x, FOR_TARGET(Shape) s, float fill) {
    return FOR_TARGET(load_end)(x + s.whole, s.left, fill);
}

ALWAYS_INLINE void FOR_TARGET(store_tail)(float *x, Floats v, FOR_TARGET(Shape) s) {
    FOR_TARGET(store_end)(x + s.whole, v, s.left);
}

#else

#define TAIL(shape) (shape).last

ALWAYS_INLINE Floats FOR_TARGET(load_tail)(const float *x, FOR_TARGET(Shape) s, float fill) {
    if (!s.whole) return FOR_TARGET(load_end)(x, s.left, fill);
    return FOR_TARGET(choose)(s.covered, (Floats){0} + fill, FOR_TARGET(load)(x + s.last));
}

ALWAYS_INLINE void FOR_TARGET(store_tail)(float *x, Floats v, FOR_TARGET(Shape) s) {
    FOR_TARGET(store_last)(x, v, s);
}

#endif

/* exp(x) for x in [LOWEST, -LOWEST] to float32 rounding; of what is less than any normal number,
 * and always at LOWEST, it may be 0; NaN stays. */
static inline Floats FOR_TARGET(exp_in_range)(Floats x) {
    Floats sum = x * 1.44269504f + ROUNDER, n = sum - ROUNDER; /* to a whole number */
    Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = r * 1.3814598474e-3f + 8.3687168873e-3f;
    p = p * r + 4.1668388049e-2f;
    p = p * r + 1.6666520632e-1f;
    p = p * r + 4.9999993448e-1f;
    p = p * r + 1.0f;
    return (p * r + 1.0f) * (Floats)((Ints)sum << 23);
}

/* exp(x) for x <= -LOWEST. */
static inline Floats FOR_TARGET(exp_bounded)(Floats x) {
    return FOR_TARGET(exp_in_range)(FOR_TARGET(larger)((Floats){0} + LOWEST, x));
}

/* log(x) for x >= 1 to float64 rounding; NaN stays. */
static inline Doubles FOR_TARGET(log)(Doubles x) {
    Longs bits = (Longs)x, power = (bits - (int64_t)0x3fe6a09e667f3bcd) >> 52; /* of x * sqrt 2 */
    Doubles m = (Doubles)(bits - (power << 52)), f = (m - 1.0) / (m + 1.0), s = f * f;
    Doubles p = s * (1.0 / 19.0) + 1.0 / 17.0; /* of atanh */
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

/* Of exp(d) and d exp(d), and where d is 0. */
typedef struct {
    Floats sum, weighted;
    FOR_TARGET(Place) first;
} FOR_TARGET(Sums);

static inline Floats FOR_TARGET(take)(FOR_TARGET(Sums) *s, FOR_TARGET(Place) place, Floats d) {
    FOR_TARGET(find_zero)(&s->first, place, d);
    d = FOR_TARGET(larger)((Floats){0} + LOWEST, d);
    Floats e = FOR_TARGET(exp_in_range)(d);
    s->sum += e;
    s->weighted += e * d; /* 0 log 0 is 0, also for a logit of -inf */
    return e;
}

ALWAYS_INLINE Floats FOR_TARGET(highest)(const float *x, FOR_TARGET(Shape) s) {
    Floats highest = (Floats){0} - INFINITY;
    if (s.left) highest = FOR_TARGET(load_tail)(x, s, -INFINITY);
    for (int64_t c = 0; c < s.whole; c += LANES)
        highest = FOR_TARGET(larger)(FOR_TARGET(load)(x + c), highest);
    return highest;
}

ALWAYS_INLINE FOR_TARGET(Sums) FOR_TARGET(exponentials)(const float *restrict x, float top,
                                                        FOR_TARGET(Shape) shape,
                                                        float *restrict e) {
    FOR_TARGET(Sums) s = {0};
    if (shape.left) { /* before the whole vectors, which may cover a part of it */
        Floats d = FOR_TARGET(load_tail)(x, shape, -INFINITY) - top;
        Floats found = FOR_TARGET(take)(&s, FOR_TARGET(place)(TAIL(shape)), d);
        FOR_TARGET(store_tail)(e, found, shape);
    }
    Floats sum = s.sum, weighted = s.weighted;
    FOR_TARGET(Place) place = FOR_TARGET(place)(0);
    for (int64_t start = 0; start < shape.whole; start += BLOCK) {
        int64_t stop = start + BLOCK < shape.whole ? start + BLOCK : shape.whole;
        s.sum = s.weighted = (Floats){0};
        for (int64_t c = start; c < stop; c += LANES, place -= LANES)
            FOR_TARGET(store)(e + c, FOR_TARGET(take)(&s, place, FOR_TARGET(load)(x + c) - top));
        sum += s.sum;
        weighted += s.weighted;
    }
    s.sum = sum;
    s.weighted = weighted;
    return s;
}

/* Softmaxes of rows, not yet divided by their sums, into e. Each step takes all rows before the
 * next, so that a processor has several in hand. */
static void FOR_TARGET(softmax_rows)(const float *x, int64_t stride, int64_t rows,
                                     int64_t classes, float *e, int64_t e_stride,
                                     Softmaxes *found) {
    FOR_TARGET(Shape) shape = FOR_TARGET(shape)(classes);
    Floats sum[ROWS], weighted[ROWS];
    FOR_TARGET(Place) first[ROWS];
    for (int64_t r = 0; r < rows; r++)
        found->max[r] = FOR_TARGET(largest)(FOR_TARGET(highest)(x + r * stride, shape));
    for (int64_t r = 0; r < rows; r++) {
        FOR_TARGET(Sums) s = FOR_TARGET(exponentials)(x + r * stride, found->max[r], shape,
                                                      e + r * e_stride);
        sum[r] = s.sum;
        weighted[r] = s.weighted;
        first[r] = s.first;
    }
    for (int64_t r = 0; r < rows; r++) {
        int32_t best = FOR_TARGET(found)(first[r]);
        found->argmax[r] = best == INT32_MAX ? 0 : best; /* not finite: anything will do */
        found->total[r] = FOR_TARGET(sum)(sum[r]);
        found->weighted[r] = FOR_TARGET(sum)(weighted[r]);
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
 * that is 0. Tails are read before any is written: a part of a vector that was written is slow
 * to read. */
static void FOR_TARGET(scale_rows)(float *restrict e, int64_t rows, int64_t classes,
                                   const float *restrict factor, const float *restrict even,
                                   const float *restrict weight) {
    FOR_TARGET(Shape) shape = FOR_TARGET(shape)(classes);
    Floats tails[ROWS], weights = {0};
    if (weight && shape.left) weights = FOR_TARGET(load_last)(weight, shape);
    for (int64_t r = 0; shape.left && r < rows; r++)
        tails[r] = FOR_TARGET(load_last)(e + r * classes, shape);
    for (int64_t r = 0; r < rows; r++, e += classes) {
        Floats less = (Floats){0} + (even ? even[r] : 0.0f);
        if (shape.left)
            tails[r] = tails[r] * factor[r] - (weight ? less * weights : less);
        for (int64_t c = 0; c < shape.whole; c += LANES) {
            Floats v = FOR_TARGET(load)(e + c) * factor[r];
            FOR_TARGET(store)(e + c, v - (weight ? less * FOR_TARGET(load)(weight + c) : less));
        }
        if (shape.left) FOR_TARGET(store_last)(e, tails[r], shape);
    }
}

/* Of each row, divided by its sum: sum_c (e_c - p_c)^2. */
static void FOR_TARGET(distance_rows)(float *restrict e, const float *restrict p, int64_t rows,
                                      int64_t classes, const float *restrict factor,
                                      float *restrict squared) {
    FOR_TARGET(Shape) shape = FOR_TARGET(shape)(classes);
    Floats tails[ROWS], sums[ROWS];
    for (int64_t r = 0; shape.left && r < rows; r++)
        tails[r] = FOR_TARGET(load_last)(e + r * classes, shape);
    for (int64_t r = 0; r < rows; r++, e += classes, p += classes) {
        Floats sum = {0};
        if (shape.left) {
            tails[r] *= factor[r];
            Floats d = tails[r] - FOR_TARGET(load_last)(p, shape);
            d = FOR_TARGET(choose)(shape.covered, (Floats){0}, d);
            sum = d * d;
        }
        for (int64_t start = 0; start < shape.whole; start += BLOCK) {
            int64_t stop = start + BLOCK < shape.whole ? start + BLOCK : shape.whole;
            Floats s = {0};
            for (int64_t c = start; c < stop; c += LANES) {
                Floats v = FOR_TARGET(load)(e + c) * factor[r], d = v - FOR_TARGET(load)(p + c);
                FOR_TARGET(store)(e + c, v);
                s += d * d;
            }
            sum += s;
        }
        if (shape.left) FOR_TARGET(store_last)(e, tails[r], shape);
        sums[r] = sum;
    }
    for (int64_t r = 0; r < rows; r++) squared[r] = FOR_TARGET(sum)(sums[r]);
}

/* x_c *= factor_c, of rows filled up with zeros; their sum. */
static float FOR_TARGET(multiply)(float *restrict x, const float *restrict factor, int64_t count) {
    Floats sum = {0};
    for (int64_t c = 0; c < count; c += LANES) {
        Floats v = FOR_TARGET(load)(x + c) * FOR_TARGET(load)(factor + c);
        FOR_TARGET(store)(x + c, v);
        sum += v;
    }
    return FOR_TARGET(sum)(sum);
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
static double FOR_TARGET(weighted_sum)(const float *restrict x, float shift,
                                       const float *restrict weight, int64_t classes) {
    double sum = 0.0;
    for (int64_t start = 0; start < classes; start += BLOCK) {
        int64_t stop = start + BLOCK < classes ? start + BLOCK : classes;
        float s = 0.0f;
        for (int64_t c = start; c < stop; c++) s += (weight ? weight[c] : 1.0f) * (x[c] - shift);
        sum += s;
    }
    return sum;
}

static inline Floats FOR_TARGET(gradient)(Floats x, float high, float low, float factor,
                                          Floats smooth) {
    return FOR_TARGET(exp_bounded)(x - high - low) * factor - smooth;
}

/* out_c = factor * exp(x_c - lse) - smooth * weight_c; lse in two parts, since float32 alone
 * would round away what decides. */
static void FOR_TARGET(gradient_row)(const float *restrict x, double lse, float factor,
                                     float smooth, const float *restrict weight, int64_t classes,
                                     float *restrict out) {
    FOR_TARGET(Shape) shape = FOR_TARGET(shape)(classes);
    float high = (float)lse, low = (float)(lse - high);
    Floats even = (Floats){0} + smooth, g;
    if (shape.left) { /* before the whole vectors, which may cover a part of it */
        if (weight) even = FOR_TARGET(load_tail)(weight, shape, 0.0f) * smooth;
        g = FOR_TARGET(load_tail)(x, shape, high);
        FOR_TARGET(store_tail)(out, FOR_TARGET(gradient)(g, high, low, factor, even), shape);
    }
    for (int64_t c = 0; c < shape.whole; c += LANES) {
        if (weight) even = FOR_TARGET(load)(weight + c) * smooth;
        g = FOR_TARGET(load)(x + c);
        FOR_TARGET(store)(out + c, FOR_TARGET(gradient)(g, high, low, factor, even));
    }
}

/* exp of values of 87 at most, in place */
static void FOR_TARGET(exp_row)(float *x, int64_t count) {
    FOR_TARGET(Shape) shape = FOR_TARGET(shape)(count);
    Floats tail = {0};
    if (shape.left) tail = FOR_TARGET(load_last)(x, shape);
    for (int64_t c = 0; c < shape.whole; c += LANES)
        FOR_TARGET(store)(x + c, FOR_TARGET(exp_bounded)(FOR_TARGET(load)(x + c)));
    if (shape.left) FOR_TARGET(store_last)(x, FOR_TARGET(exp_bounded)(tail), shape);
}

/* What the statistics of a few samples say; of the label, the heads that are asked. Head h of
 * sample i is at h * plane + i in nll and present, at h * near + i in the rest; of what a sample
 * lacks, statistics are 0. */
static void FOR_TARGET(signals)(const float *nll, const uint8_t *present, int64_t plane,
                                const float *entropy, const float *distance,
                                const int64_t *prediction, int64_t near,
                                const uint8_t *asked, const float *head_weight,
                                const float *usual, float per_log, int64_t heads, int64_t count,
                                Signals *out) {
    static const uint8_t all[ROWS] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    float number[ROWS] = {0.0f}, surprisal[ROWS] = {0.0f}, excess[ROWS] = {0.0f};
    float apart[ROWS] = {0.0f}, mass[ROWS] = {0.0f}, least[ROWS], most[ROWS];
    int32_t finite[ROWS], differ[ROWS] = {0}, witnesses[ROWS] = {0};
    for (int r = 0; r < ROWS; r++) finite[r] = 1, least[r] = INFINITY, most[r] = -INFINITY;
    for (int64_t h = 0; h < heads; h++) {
        const uint8_t *here = present ? present + h * plane : all;
        const float *x = nll + h * plane, *calm = entropy + h * near;
        for (int64_t r = 0; r < count; r++) {
            float more = x[r] - calm[r], beyond = more > 0.0f ? more : 0.0f;
            finite[r] &= more - more == 0.0f;
            surprisal[r] += x[r];
            float expected = calm[r] < usual[h] ? calm[r] : usual[h];
            float ahead = x[r] > expected ? x[r] - expected : 0.0f;
            excess[r] += head_weight[h] * (ahead < LARGEST_NLL ? ahead : LARGEST_NLL);
            mass[r] += here[r] ? head_weight[h] : 0.0f;
            number[r] += here[r] != 0;
            apart[r] += distance[h * near + r];
            int32_t says = (here[r] != 0) & asked[h];
            witnesses[r] += says;
            least[r] = says && beyond < least[r] ? beyond : least[r];
            most[r] = says && calm[r] > most[r] ? calm[r] : most[r];
            differ[r] |= says && prediction[h * near + r] != prediction[r];
        }
    }
    for (int r = 0; r < ROWS; r++) { /* from count on of nothing, NaN, which nobody reads */
        float others = number[r] > 2.0f ? number[r] - 1.0f : 1.0f;
        surprisal[r] = -surprisal[r] / number[r];
        least[r] = -least[r];
        out->surprise[r] = excess[r] / mass[r];
        out->consistency[r] = apart[r] / others;
        out->agree[r] = !differ[r] && witnesses[r] > 1;
        out->finite[r] = finite[r];
    }
    FOR_TARGET(exp_row)(surprisal, ROWS);
    FOR_TARGET(exp_row)(least, ROWS);
    for (int r = 0; r < ROWS; r++) {
        out->deviation[r] = 1.0f - surprisal[r];
        float counts = witnesses[r] > 2 ? 1.0f : OF_ONE;
        out->doubt[r] = (1.0f - least[r]) * counts;
        out->common[r] = (1.0f - most[r] * per_log) * COMMON_ERROR * counts;
    }
}

/* Sums of w, w min(x, LARGEST_NLL) and w^2; x, not negative, may also be NaN where w is 0. */
static void FOR_TARGET(weighted_sums)(const float *w, const float *x, int64_t count,
                                      double *sums) {
    FOR_TARGET(Shape) shape = FOR_TARGET(shape)(count);
    Floats weight = {0}, value = {0}, largest = (Floats){0} + LARGEST_NLL;
    if (shape.left) {
        weight = FOR_TARGET(load_tail)(w, shape, 0.0f);
        value = FOR_TARGET(load_tail)(x, shape, 0.0f);
    }
    value = FOR_TARGET(choose)(value < largest, value, largest);
    sums[0] = FOR_TARGET(sum)(weight);
    sums[1] = FOR_TARGET(sum)(weight * value);
    sums[2] = FOR_TARGET(sum)(weight * weight);
    for (int64_t start = 0; start < shape.whole; start += BLOCK) {
        int64_t stop = start + BLOCK < shape.whole ? start + BLOCK : shape.whole;
        Floats sum = {0}, weighted = {0}, squares = {0};
        for (int64_t c = start; c < stop; c += LANES) {
            weight = FOR_TARGET(load)(w + c);
            value = FOR_TARGET(load)(x + c);
            sum += weight;
            weighted += weight * FOR_TARGET(choose)(value < largest, value, largest);
            squares += weight * weight;
        }
        sums[0] += FOR_TARGET(sum)(sum);
        sums[1] += FOR_TARGET(sum)(weighted);
        sums[2] += FOR_TARGET(sum)(squares);
    }
}

/* coefficient_i = factor * w_i, which may be where the loss is; adds its product with the loss to
 * value, or returns the sum of those when NULL. With `guard`, a product with 0 is 0. */
static double FOR_TARGET(coefficients)(const float *w, float factor, const float *loss, int guard,
                                       int64_t count, float *coefficient, float *value) {
    FOR_TARGET(Shape) shape = FOR_TARGET(shape)(count);
    Floats last = {0}, term = {0}, before = {0};
    Ints kept = (Ints){0} - !guard;
    double total = 0.0;
    if (shape.left) {
        last = FOR_TARGET(load_last)(w, shape) * factor;
        term = last * FOR_TARGET(load_last)(loss, shape);
        term = FOR_TARGET(choose)(kept | (last != 0.0f), term, (Floats){0});
        if (value) before = FOR_TARGET(load_last)(value, shape);
        else total = FOR_TARGET(sum)(FOR_TARGET(choose)(shape.covered, (Floats){0}, term));
    }
    for (int64_t start = 0; start < shape.whole; start += BLOCK) {
        int64_t stop = start + BLOCK < shape.whole ? start + BLOCK : shape.whole;
        Floats sum = {0};
        for (int64_t c = start; c < stop; c += LANES) {
            Floats f = FOR_TARGET(load)(w + c) * factor, t = f * FOR_TARGET(load)(loss + c);
            t = FOR_TARGET(choose)(kept | (f != 0.0f), t, (Floats){0});
            FOR_TARGET(store)(coefficient + c, f);
            if (value) FOR_TARGET(store)(value + c, FOR_TARGET(load)(value + c) + t);
            else sum += t;
        }
        total += FOR_TARGET(sum)(sum);
    }
    if (shape.left) {
        FOR_TARGET(store_last)(coefficient, last, shape);
        if (value) FOR_TARGET(store_last)(value, before + term, shape);
    }
    return total;
}

/* Sum over rows of x_a x_b; rows and those of out are WATCHED long, filled up with zeros. */
static void FOR_TARGET(products)(const float *restrict x, int64_t rows, int64_t width,
                                 float *restrict out) {
    enum { TOGETHER = 4, VECTORS = WATCHED / LANES };
    for (int64_t a = 0; a < width; a += TOGETHER) {
        Floats sums[TOGETHER][VECTORS] = {{{0}}};
        for (int64_t i = 0; i < rows; i++) {
            const float *row = x + i * WATCHED;
            for (int v = 0; v < VECTORS; v++) {
                Floats columns = FOR_TARGET(load)(row + v * LANES);
                for (int t = 0; t < TOGETHER; t++) sums[t][v] += columns * row[a + t];
            }
        }
        memcpy(out + a * WATCHED, sums, sizeof sums);
    }
}

/* Squared lengths of the columns of x, [width, ROWS], once the transpose of an upper triangular
 * factor is divided out of them; rows of the factor are WATCHED long. Overwrites x. */
static void FOR_TARGET(whiten)(const float *restrict factor, int64_t width, float *restrict x,
                               float *restrict squared) {
    for (int at = 0; at < ROWS; at += LANES) {
        Floats sum = {0};
        for (int64_t k = 0; k < width; k++) {
            const float *row = factor + k * WATCHED;
            Floats v = FOR_TARGET(load)(x + k * ROWS + at) / row[k];
            sum += v * v;
            for (int64_t j = k + 1; j < width; j++) {
                float *rest = x + j * ROWS + at;
                FOR_TARGET(store)(rest, FOR_TARGET(load)(rest) - v * row[j]);
            }
        }
        FOR_TARGET(store)(squared + at, sum);
    }
}

static inline Floats FOR_TARGET(log_probability)(Floats x, float of_target, float lost) {
    x = FOR_TARGET(larger)((Floats){0} + LEAST_LOG, x - of_target - lost);
    return FOR_TARGET(choose)(x < (Floats){0}, x, (Floats){0});
}

/* To sums of weighted log-probabilities. */
static void FOR_TARGET(add_logs)(const float *restrict x, float of_target, float lost,
                                 float weight, int64_t classes, float *restrict sums) {
    int64_t c = 0;
    for (; c + LANES <= classes; c += LANES) {
        Floats v = FOR_TARGET(log_probability)(FOR_TARGET(load)(x + c), of_target, lost);
        FOR_TARGET(store)(sums + c, FOR_TARGET(load)(sums + c) + v * weight);
    }
    for (; c < classes; c++) sums[c] += weight * log_probability(x[c], of_target, lost);
}

/* Exponentials of sums less the largest, in place; what they sum up to. */
static double FOR_TARGET(pool)(float *restrict sums, int64_t classes) {
    float top = FOR_TARGET(largest)(FOR_TARGET(highest)(sums, FOR_TARGET(shape)(classes)));
    for (int64_t c = 0; c < classes; c++) sums[c] -= top;
    FOR_TARGET(exp_row)(sums, classes);
    return FOR_TARGET(weighted_sum)(sums, 0.0f, NULL, classes);
}

/* Of log-probabilities, each by its class in the pool. */
static double FOR_TARGET(sum_of_logs)(const float *restrict pool, const float *restrict x,
                                      float of_target, float lost, int64_t classes) {
    double sum = 0.0;
    int64_t c = 0;
    while (c + LANES <= classes) {
        Floats part = {0};
        for (int k = 0; k < BLOCK && c + LANES <= classes; k += LANES, c += LANES)
            part += FOR_TARGET(load)(pool + c) *
                    FOR_TARGET(log_probability)(FOR_TARGET(load)(x + c), of_target, lost);
        sum += FOR_TARGET(sum)(part);
    }
    for (; c < classes; c++) sum += pool[c] * log_probability(x[c], of_target, lost);
    return sum;
}

static const RowKernels FOR_TARGET(kernels) = {
    FOR_TARGET(softmax_rows), FOR_TARGET(scale_rows), FOR_TARGET(distance_rows),
    FOR_TARGET(weighted_sum), FOR_TARGET(gradient_row), FOR_TARGET(exp_row),
    FOR_TARGET(signals),       FOR_TARGET(weighted_sums), FOR_TARGET(coefficients),
    FOR_TARGET(multiply),      FOR_TARGET(contradiction), FOR_TARGET(products),
    FOR_TARGET(whiten),        FOR_TARGET(add_logs),      FOR_TARGET(pool),
    FOR_TARGET(sum_of_logs),
};

#undef TAIL
#undef Floats
#undef Ints
#undef Half
#undef Doubles
#undef Longs
