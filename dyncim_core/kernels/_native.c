/* The kernels for float32 logits on a CPU. Of a loss: statistics of every head, the curriculum step
 * and the gradient, each in one call, or the last two in one. Of a fusion: gates, mixtures and the
 * moments of features. No torch headers: native.py passes addresses.
 *
 * Layout is head-major: logits are one row-strided [B, C] array per head, statistics [4, H, B].
 * eager.py holds the same formulas in PyTorch, reference.py in NumPy; tests compare all three.
 */
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAVE_TARGETS
#include <immintrin.h>
#endif

#define INTERFACE 14 /* raised, as in native.py, when what a call passes, or a formula, changes */

#define ALWAYS_INLINE static inline __attribute__((always_inline))

#define MAX_HEADS 9 /* of a loss; or modalities of a fusion, whose state has one more */
#define SIGNALS 3
#define GROUPS 1024 /* of classes that are told apart; a power of 2 */
#define LARGEST_NLL 1e30f /* sums of anything smaller over heads and samples are finite */
#define LEAST_LOG -100.0f /* log-probability in the pool of all heads */
#define OF_ONE 0.0125f /* what a contradiction counts that only one modality bears out */
#define COMMON_ERROR 0.07f /* of what all heads are sure of, what they may be wrong about */
#define LARGEST_LOG_WEIGHT 8.0 /* nats, either way */
#define LOWEST_LOG_PRIOR (-30.0) /* nats */
#define BLOCK 512
#define ROWS 16 /* rows of a head in hand at a time, at most */
#define PADDING 16 /* floats of the widest vector */
#define LANES_OF_SUM 8 /* numbers that are added up side by side */
#define PRIOR_OF_SKILL 20.0 /* samples that a prior is worth */
#define PRIOR_OF_WEIGHT 10.0
#define SMALLEST_ERROR 1e-3 /* of chance */
#define SMALLEST_SKILL 1e-4 /* what is less is rounding */
#define LEAST_WEIGHT 0.02 /* of logits */
#define MOST_WEIGHT 2.0
#define WATCHED 32 /* features of a modality whose moments are kept, at most */

#define SHRINKAGE 1e-2         /* share of the mean variance that every direction has at least */
#define SAMPLES_PER_FEATURE 8.0 /* that a covariance takes */
#define SMALLEST_VARIANCE 1e-10 /* over the mean square, that float32 can tell from none */
#define SMALLEST_NORMAL 1.17549435e-38
#define MOST_NOVEL 1e30f

#define LARGEST_SQUARE 1e36 /* of a norm: averages of anything smaller are finite */
#define ROUNDER 12583039.0f /* 1.5 * 2^23 + 127: a sum with n is rounded, and the exponent of 2^n
                             * is in its last bits, as long as n is in [-127, 127] */
#define LOWEST (-87.7f) /* of which n is -127, whose exponent is that of 0: so is exp of less */

static const int32_t count_up[PADDING] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* Of rows of one head; total: sum exp(x - max). */
typedef struct {
    float max[ROWS], total[ROWS], weighted[ROWS], inverse_total[ROWS];
    double log_total[ROWS], entropy[ROWS];
    int32_t argmax[ROWS];
} Softmaxes;

/* What the heads of a few samples say. */
typedef struct {
    float deviation[ROWS], consistency[ROWS], surprise[ROWS];
    float doubt[ROWS];                   /* of the target, by the head that doubts it least */
    float common[ROWS];                  /* what heads that agree may be wrong about together */
    int32_t finite[ROWS], agree[ROWS];   /* statistics are; heads, two at least, do */
} Signals;

/* One set of row kernels; which, depends on the processor. */
typedef struct {
    void (*softmax_rows)(const float *x, int64_t stride, int64_t rows, int64_t classes, float *e,
                         int64_t e_stride, Softmaxes *found);
    void (*scale_rows)(float *e, int64_t rows, int64_t classes, const float *factor,
                       const float *even, const float *weight);
    void (*distance_rows)(float *e, const float *p, int64_t rows, int64_t classes,
                          const float *factor, float *squared);
    double (*weighted_sum)(const float *x, float shift, const float *weight, int64_t classes);
    void (*gradient_row)(const float *x, double lse, float factor, float smooth,
                         const float *weight, int64_t classes, float *out);
    void (*exp_row)(float *x, int64_t count);
    void (*signals)(const float *nll, const uint8_t *present, int64_t plane, const float *entropy,
                    const float *distance, const int64_t *prediction, int64_t near,
                    const uint8_t *asked, const float *head_weight, const float *usual,
                    float per_log, int64_t heads, int64_t count, Signals *out);
    void (*weighted_sums)(const float *w, const float *x, int64_t count, double *sums);
    double (*coefficients)(const float *w, float factor, const float *loss, int guard,
                           int64_t count, float *coefficient, float *value);
    float (*multiply)(float *x, const float *factor, int64_t count);
    double (*contradiction)(const float *probs, int64_t stride, int64_t modalities, int64_t m,
                            const float *share, int64_t classes);
    void (*products)(const float *x, int64_t rows, int64_t width, float *out);
    void (*whiten)(const float *factor, int64_t width, float *x, float *squared);
    void (*add_logs)(const float *x, float of_target, float lost, float weight, int64_t classes,
                     float *sums);
    double (*pool)(float *sums, int64_t classes);
    double (*sum_of_logs)(const float *pool, const float *x, float of_target, float lost,
                          int64_t classes);
} RowKernels;

/* Log-probability of a class in the pool of all heads, from its logit and from the target's logit
 * and NLL, which are finite. */
static float log_probability(float x, float of_target, float lost) {
    float found = x - of_target - lost;
    found = found > LEAST_LOG ? found : LEAST_LOG;
    return found < 0.0f ? found : 0.0f;
}

#define JOIN(name, target) name##_##target
#define FOR_TARGET_(name, target) JOIN(name, target)
#define FOR_TARGET(name) FOR_TARGET_(name, TARGET)

/* LANES: floats in a vector, of the processor's own width; compilers split wider ones badly. */
#define TARGET baseline
#define LANES 4
#include "_native_rows.h"
#undef TARGET
#undef LANES

#ifdef HAVE_TARGETS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define TARGET avx2
#define LANES 8
#include "_native_rows.h"
#undef TARGET
#undef LANES
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define TARGET avx512
#define LANES 16
#define MASKED
#include "_native_rows.h"
#undef MASKED
#undef TARGET
#undef LANES
#pragma GCC pop_options
#endif

static RowKernels rows_of;
static const char *capability; /* their name, as torch calls it */

#ifdef HAVE_TARGETS
/* Whether no more than that is to be used: torch heeds the same variable. */
static int is_asked(const char *name) {
    const char *asked = getenv("ATEN_CPU_CAPABILITY");
    return asked && strcmp(asked, name) == 0;
}
#endif

static void choose_kernels(void) {
    rows_of = kernels_baseline;
    capability = "default";
#ifdef HAVE_TARGETS
    __builtin_cpu_init();
    if (is_asked("default") || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return;
    rows_of = kernels_avx2;
    capability = "avx2";
    if (is_asked("avx2") || !__builtin_cpu_supports("avx512f") ||
        !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vl"))
        return;
    rows_of = kernels_avx512;
    capability = "avx512";
#endif
}

typedef struct {
    int64_t heads, batch, classes;
    int64_t start, stop; /* the samples to work on, of the batch */
    const float *logits[MAX_HEADS];
    int64_t stride[MAX_HEADS];
    const int64_t *target;
    const uint8_t *present; /* [H, B] or NULL */
    const float *weight;    /* [C] or NULL */
    int64_t ignore_index;
    double smoothing;
} Problem;

static int target_fits(const Problem *p) {
    for (int64_t i = p->start; i < p->stop; i++) {
        int64_t y = p->target[i];
        if (y != p->ignore_index && (y < 0 || y >= p->classes)) return 0;
    }
    return 1;
}

static double sum_of(const float *weight, int64_t classes) {
    double sum = 0.0;
    if (!weight) return (double)classes;
    for (int64_t c = 0; c < classes; c++) sum += weight[c];
    return sum;
}

/* Where statistics go: entry (h, i) at h * plane + i, and those that only the signals of a
 * sample need at h * near + i - start. */
typedef struct {
    float *loss, *nll, *entropy, *distance;
    int64_t *prediction;
    double *lse; /* or NULL */
    int64_t near, start;
} Statistics;

/* What statistics are computed with: softmaxes go to probs[h] + i * stride, or to scratch. */
typedef struct {
    int64_t rows; /* in hand at a time */
    double weight_sum;
    float **probs, *scratch;
} Work;

/* 0, or -1 without memory for two rows. */
static int work_for(const Problem *p, float **probs, Work *w) {
    int64_t rows = BLOCK * 16 / p->classes;
    w->rows = rows < 1 ? 1 : rows > ROWS ? ROWS : rows;
    w->weight_sum = sum_of(p->weight, p->classes);
    w->probs = probs;
    w->scratch = NULL;
    if (probs) return 0;
    w->scratch = malloc(2 * (size_t)(w->rows * p->classes) * sizeof *w->scratch);
    return w->scratch ? 0 : -1;
}

static float *probs_of(const Problem *p, const Work *w, int64_t h, int64_t i) {
    return w->probs ? w->probs[h] + i * p->classes : w->scratch + (h ? w->rows * p->classes : 0);
}

/* Of the samples from `from` on that are in hand. */
static void statistics_of_rows(const Problem *p, const Work *w, int64_t from, Statistics *s) {
    int64_t count = p->stop - from < w->rows ? p->stop - from : w->rows;
    const float *fused = probs_of(p, w, 0, from);
    for (int64_t h = 0; h < p->heads; h++) {
        float *e = probs_of(p, w, h, from), squared[ROWS] = {0.0f};
        Softmaxes f;
        rows_of.softmax_rows(p->logits[h] + from * p->stride[h], p->stride[h], count, p->classes,
                             e, p->classes, &f);
        if (h)
            rows_of.distance_rows(e, fused, count, p->classes, f.inverse_total, squared);
        else if (p->heads > 1 || w->probs)
            rows_of.scale_rows(e, count, p->classes, f.inverse_total, NULL, NULL);
        for (int64_t r = 0; r < count; r++) {
            int64_t i = from + r, y = p->target[i];
            int64_t at = h * p->batch + i, near = h * s->near + i - s->start;
            s->loss[at] = s->nll[at] = 0.0f;
            if (p->present && !p->present[at]) {
                s->entropy[near] = s->distance[near] = 0.0f;
                s->prediction[near] = 0;
                if (s->lse) s->lse[at] = 0.0;
                continue;
            }
            s->entropy[near] = (float)f.entropy[r];
            s->distance[near] = sqrtf(squared[r] / 2.0f);
            s->prediction[near] = f.argmax[r];
            if (s->lse) s->lse[at] = f.max[r] + f.log_total[r];
            if (y == p->ignore_index) continue;
            const float *x = p->logits[h] + i * p->stride[h];
            double surprisal = f.log_total[r] - ((double)x[y] - f.max[r]);
            double weighted = p->weight ? surprisal * p->weight[y] : surprisal;
            if (p->smoothing > 0.0) {
                double total = w->weight_sum * f.log_total[r] -
                               rows_of.weighted_sum(x, f.max[r], p->weight, p->classes);
                weighted =
                    (1.0 - p->smoothing) * weighted + p->smoothing * total / (double)p->classes;
            }
            s->nll[at] = (float)surprisal;
            s->loss[at] = (float)weighted;
        }
    }
}

/* rows: [4, H, B]. 0, or -1 without memory. */
static int statistics(const Problem *p, float *rows, int64_t *prediction, double *lse) {
    int64_t plane = p->heads * p->batch;
    Statistics s = {rows,       rows + plane, rows + 2 * plane, rows + 3 * plane,
                    prediction, lse,          p->batch,         0};
    Work w;
    if (work_for(p, NULL, &w)) return -1;
    for (int64_t i = p->start; i < p->stop; i += w.rows) statistics_of_rows(p, &w, i, &s);
    free(w.scratch);
    return 0;
}

/* A row of the gradient: softmax * P - even * weight, less `hit` at the target. */
typedef struct {
    float softmax, even, hit;
} Factors;

/* Of a loss with a gradient of 1, but for the class weight of the target. */
static Factors factors_of(const Problem *p) {
    double even = p->smoothing / (double)p->classes;
    return (Factors){(float)(even * sum_of(p->weight, p->classes)), (float)even,
                     (float)(1.0 - p->smoothing)};
}

static Factors times(Factors f, float g, const Problem *p, int64_t i) {
    int64_t y = p->target[i];
    if (y == p->ignore_index) return (Factors){0.0f, 0.0f, 0.0f};
    float hit = p->weight ? f.hit * p->weight[y] : f.hit;
    return (Factors){g * (hit + f.softmax), g * f.even, g * hit};
}

/* From saved normalisers. coefficient is [H, B] or NULL; grad has the given strides over heads
 * and samples. */
static void gradients(const Problem *p, const float *grad, int64_t head_stride,
                      int64_t sample_stride, const float *coefficient, const double *lse,
                      int guard, float **out) {
    Factors one = factors_of(p);
    for (int64_t h = 0; h < p->heads; h++)
        for (int64_t i = p->start; i < p->stop; i++) {
            int64_t at = h * p->batch + i;
            float g = grad[h * head_stride + i * sample_stride];
            if (coefficient) g *= coefficient[at];
            float *row = out[h] + i * p->classes;
            Factors f = times(one, g, p, i);
            if (guard && f.softmax == 0.0f) {
                memset(row, 0, (size_t)p->classes * sizeof *row);
                continue;
            }
            rows_of.gradient_row(p->logits[h] + i * p->stride[h], lse[at], f.softmax, f.even,
                                 p->weight, p->classes, row);
            if (f.hit != 0.0f) row[p->target[i]] -= f.hit;
        }
}

/* The same from the softmaxes that `out` holds. */
static void finish_gradients(const Problem *p, const float *coefficient, int guard, float **out) {
    Factors one = factors_of(p);
    for (int64_t h = 0; h < p->heads; h++)
        for (int64_t from = 0; from < p->batch; from += ROWS) {
            int64_t count = p->batch - from < ROWS ? p->batch - from : ROWS;
            float *row = out[h] + from * p->classes, softmax[ROWS], even[ROWS], hit[ROWS];
            for (int64_t r = 0; r < count; r++) {
                Factors f = times(one, coefficient[h * p->batch + from + r], p, from + r);
                softmax[r] = f.softmax, even[r] = f.even, hit[r] = f.hit;
                if (guard && f.softmax == 0.0f)
                    memset(row + r * p->classes, 0, (size_t)p->classes * sizeof *row);
            }
            rows_of.scale_rows(row, count, p->classes, softmax, even, p->weight);
            for (int64_t r = 0; r < count; r++)
                if (hit[r] != 0.0f) row[r * p->classes + p->target[from + r]] -= hit[r];
        }
}

/* Gradients times the incoming one, in place. */
static void scale(int64_t heads, int64_t batch, int64_t classes, const float *grad,
                  int64_t head_stride, int64_t sample_stride, int guard, float **out) {
    if (batch == 0 || (head_stride == 0 && sample_stride == 0 && *grad == 1.0f)) return;
    for (int64_t h = 0; h < heads; h++)
        for (int64_t i = 0; i < batch; i++) {
            const float *g = grad + h * head_stride + i * sample_stride;
            float *row = out[h] + i * classes;
            if (*g == 0.0f && guard) memset(row, 0, (size_t)classes * sizeof *row);
            else rows_of.scale_rows(row, 1, classes, g, NULL, NULL);
        }
}

/* Averages of samples held out, of each head: the rows of held_out_averages. */
enum { SEEN, HITS, CHANCE, NLL, SLOPE, DOUBT, OWN_DOUBT, SAID };

/* The running averages of a CurriculumState and its per-sample memory, updated in place. */
typedef struct {
    int64_t heads; /* of the state: at least those of the batch */
    float *log_quality, *quality;
    int64_t *seen;
    float *signal_mean, *volatility, *label_noise, *doubted, *effective_share;
    int64_t *step, *nonfinite;
    float *held_out[SAID], *skill, *logit_weight;
    float *log_class_average;
    int64_t *class_seen;
    float *class_weight;
    int64_t samples; /* 0 without a memory */
    const int64_t *index;
    float *memory_nll;
    int32_t *memory_visits;
    float *memory_weight;
} State;

typedef enum { REDUCE_MEAN, REDUCE_SUM, REDUCE_NONE } Reduction;

typedef struct {
    double surprise_strength, label_noise /* < 0: as the state says */, pacing_strength;
    double unimodal_strength;
    int skip_nonfinite;
    double decay, memory_decay;
    Reduction reduction;
    double held_out; /* share of the memory's samples */
} Settings;

static double clamp(double x, double low, double high) {
    return x < low ? low : x > high ? high : x;
}

static void average(float *mean, double value, int first, double decay) {
    *mean = first ? (float)value : (float)(value + decay * (*mean - value));
}

/* Harmonic mean over the modalities of how much fusion improves on each. */
static double log_hmir_of(const float *log_quality, int64_t modalities) {
    const double eps = 1e-3;
    double inverse_rates = 0.0;
    for (int64_t m = 0; m < modalities; m++) {
        double log_ratio = (double)log_quality[0] - log_quality[1 + m];
        double floored = log_ratio > log1p(eps) ? log_ratio : log1p(eps);
        inverse_rates += exp(-floored) / -expm1(-floored);
    }
    return log((double)modalities) - log(inverse_rates);
}

/* (1 - lambda) + lambda * M * alpha_m for every modality. */
static void modality_coefficients(const float *log_quality, int64_t modalities, double *out) {
    const double cap = 1.0;
    double mean = 0.0, top = -INFINITY, total = 0.0, alpha[MAX_HEADS];
    for (int64_t m = 0; m < modalities; m++) {
        double log_ratio = (double)log_quality[0] - log_quality[1 + m];
        mean += log_ratio / (double)modalities;
        alpha[m] = log_ratio < cap ? log_ratio : cap;
        top = alpha[m] > top ? alpha[m] : top;
    }
    for (int64_t m = 0; m < modalities; m++) total += alpha[m] = exp(alpha[m] - top);
    /* Where exp overflows, all lags are capped and all alpha alike: any balance will do. */
    double excess = log1p(exp(log_hmir_of(log_quality, modalities))) - mean;
    double balance = -expm1(excess < 0.0 ? excess : 0.0);
    for (int64_t m = 0; m < modalities; m++)
        out[m] = (1.0 - balance) + balance * (double)modalities * alpha[m] / total;
}

/* What a modality's own loss counts, by its skill, that of the fused head and that of the best. */
static double loss_share(double skill, double fused, double best) {
    double part = fused > 0.0 ? clamp(skill / fused, 0.0, 1.0) : 1.0;
    part *= best > 0.0 ? clamp(3.0 * best, 0.0, 1.0) : 1.0;
    return part * part > 0.1 ? part * part : 0.1;
}

/* How far what a head learns holds for samples held out, by its quality on those and in training. */
static double generalisation(double held_out, double trained) {
    const double least = 0.1;
    double kept = clamp((held_out + least) / (trained + least), 0.0, 1.0);
    return kept * kept * kept * kept;
}

/* Whether a sample is to be kept out of training: the hash of its index is below that. */
static int is_held_out(int64_t index, uint64_t below) {
    uint64_t bits = (uint64_t)index * 0x3A805Fu;
    return (uint32_t)(bits ^ (bits >> 14)) * 0x5D5F7413u < below;
}

static int is_there(const Problem *p, int64_t h, int64_t i) {
    return !p->present || p->present[h * p->batch + i];
}

static float bounded(float nll) { return nll < LARGEST_NLL ? nll : LARGEST_NLL; }

/* How the NLL of a sample under the pool of all heads that are there changes with their weights,
 * where the fused logits hold a share of the modalities'. */
static void find_slopes(const Problem *p, const float *weight, float shared, const float *nll,
                        int64_t i, float *pool, double *slope) {
    int64_t y = p->target[i];
    memset(pool, 0, (size_t)p->classes * sizeof *pool);
    for (int64_t h = 0; h < p->heads; h++) {
        const float *x = p->logits[h] + i * p->stride[h];
        float own = h ? weight[h] - shared * weight[0] : weight[0];
        if (is_there(p, h, i))
            rows_of.add_logs(x, x[y], nll[h * p->batch + i], own, p->classes, pool);
    }
    double total = rows_of.pool(pool, p->classes), modalities = 0.0;
    for (int64_t h = p->heads; h-- > 0;) {
        const float *x = p->logits[h] + i * p->stride[h], lost = nll[h * p->batch + i];
        if (!is_there(p, h, i)) continue;
        slope[h] = bounded(lost) + rows_of.sum_of_logs(pool, x, x[y], lost, p->classes) / total;
        if (h) modalities += slope[h];
    }
    slope[0] -= shared * modalities;
}

/* What valid samples say, summed up. */
typedef struct {
    int64_t count;
    double said[SAID][MAX_HEADS]; /* of those held out */
    double contradicted; /* by all heads */
    double doubted;      /* by the fused head */
    double signal[SIGNALS], difficulty;
} Tally;

static int64_t group_of(int64_t class) { return class & (GROUPS - 1); }

static int64_t groups_of(const Problem *p) { return p->classes < GROUPS ? p->classes : GROUPS; }

/* Samples trained on so far, each class once more. */
static double trained_on(const Problem *p, const State *s) {
    int64_t groups = groups_of(p), all = groups;
    for (int64_t g = 0; g < groups; g++) all += s->class_seen[g];
    return (double)all;
}

static float best_of(const float *skill, int64_t heads) {
    float best = 0.0f;
    for (int64_t h = 0; h < heads; h++) best = skill[h] > best ? skill[h] : best;
    return best;
}

/* Heads that are asked whether a label looks wrong. */
static void find_witnesses(const float *skill, int64_t heads, uint8_t *asked) {
    float best = best_of(skill + 1, heads - 1);
    for (int64_t h = 0; h < heads; h++) asked[h] = h == 0 || 2.0f * skill[h] >= best;
}

/* Label noise that samples held out show: contradicted by all heads, or by what the fused head
 * doubts of samples trained on and held out, as far as it knows more than any modality. */
static double seen_noise(double contradicted, double trained, double held_out, const float *skill,
                         int64_t heads) {
    double best = best_of(skill + 1, heads - 1), ahead = 0.0;
    if (heads == 1 || held_out == 0.0 || (best == 0.0 && skill[0] == 0.0f)) return contradicted;
    if (skill[0] > best) ahead = 1.0 - best / skill[0];
    double of_fused = trained * (1.0 - trained / held_out) * pow(ahead, 3.0);
    return of_fused > contradicted ? of_fused : contradicted;
}

static double trust_of(double skill) { return skill > 0.02 ? skill : 0.02; }

/* How far each head is to be believed. */
static void find_trust(const float *skill, int64_t heads, float *trust) {
    float best = best_of(skill, heads);
    for (int64_t h = 0; h < heads; h++) trust[h] = best > 0.0f ? (float)trust_of(skill[h]) : 1.0f;
}

/* Take in what heads say about samples that they were never trained on, of which there are so
 * many in all. */
static void listen(const Problem *p, const Tally *heard, double samples, State *s,
                   double decay) {
    double batch = (double)p->batch, own = samples / (samples + PRIOR_OF_SKILL), mean = 0.0;
    double own_of_weight = samples / (samples + PRIOR_OF_WEIGHT);
    for (int64_t h = 0; h < p->heads; h++) {
        /* Of a modality that was not heard they stay, or they would fade to nothing. */
        for (int k = 0; heard->said[SEEN][h] > 0.0 && k < SAID; k++)
            average(s->held_out[k] + h, heard->said[k][h] / batch, 0, decay);
        double mass = s->held_out[SEEN][h], chance = s->held_out[CHANCE][h] / mass;
        double hit_rate = s->held_out[HITS][h] / mass;
        double error = 1.0 - chance > SMALLEST_ERROR ? 1.0 - chance : SMALLEST_ERROR;
        double skill = (hit_rate - chance) / error;
        skill = skill < 1.0 ? skill : 1.0;
        /* A modality never heard counts as equal to the fusion, which favours neither side. */
        if (skill <= SMALLEST_SKILL) skill = 0.0;
        s->skill[h] = mass > 0.0 ? (float)skill : s->skill[0];
        mean += s->skill[h] / (double)p->heads;
    }
    for (int64_t h = 0; h < p->heads; h++) {
        s->skill[h] = (float)(own * s->skill[h] + (1.0 - own) * mean);
        double mass = s->held_out[SEEN][h], weight = s->logit_weight[h];
        if (mass == 0.0) s->logit_weight[h] = s->logit_weight[0];
        if (heard->said[SEEN][h] == 0.0) continue;
        double uphill = weight - s->held_out[SLOPE][h] / mass;
        double goal = own_of_weight * uphill + (1.0 - own_of_weight) * s->skill[h];
        average(s->logit_weight + h, clamp(goal, LEAST_WEIGHT, MOST_WEIGHT), 0, decay);
    }
    double contradicted = s->held_out[DOUBT][0] / (double)s->held_out[SEEN][0];
    double doubted = s->held_out[OWN_DOUBT][0] / (double)s->held_out[SEEN][0];
    *s->label_noise = (float)seen_noise(contradicted, *s->doubted, doubted, s->skill, p->heads);
}

/* Weights of the weighed samples, over the average of their class, this batch included: from
 * logarithms, in place. Those of the others, 0 before, become 1. */
static void weigh_in_classes(const Problem *p, const uint8_t *weighed, float *weight, State *s,
                             double decay) {
    double total[GROUPS], kept[GROUPS], over[GROUPS];
    int64_t groups = groups_of(p), number[GROUPS];
    for (int64_t g = 0; g < groups; g++) total[g] = 0.0, kept[g] = 1.0, number[g] = 0;
    for (int64_t i = 0; i < p->batch; i++)
        if (weighed[i]) weight[i] -= s->log_class_average[group_of(p->target[i])];
    rows_of.exp_row(weight, p->batch);
    for (int64_t i = 0; i < p->batch; i++)
        if (weighed[i]) {
            int64_t g = group_of(p->target[i]);
            number[g]++;
            total[g] += weight[i];
            kept[g] *= decay;
        }
    for (int64_t g = 0; g < groups; g++)
        if (number[g]) {
            double before = s->log_class_average[g];
            double moves = kept[g] + (1.0 - kept[g]) * total[g] / (double)number[g];
            s->log_class_average[g] = (float)(before + log(moves));
            s->class_seen[g] += number[g];
            over[g] = exp(before - s->log_class_average[g]);
        }
    for (int64_t i = 0; i < p->batch; i++)
        weight[i] = weighed[i] ? (float)(over[group_of(p->target[i])] * weight[i]) : 1.0f;
}

/* Numbers of all samples, where they have head h, else 0; in part unless all have. */
static const float *of_head(const Problem *p, int64_t h, const float *numbers, float *part) {
    if (!p->present) return numbers;
    for (int64_t i = 0; i < p->batch; i++)
        part[i] = p->present[h * p->batch + i] ? numbers[i] : 0.0f;
    return part;
}

/* The coefficients of a mean over no mass, infinite or NaN, but 0 of what is absent, whose loss is
 * 0 as well; their value. */
static double without_mass(const Problem *p, const float *w, const double *factor, double scale,
                           const float *loss, float *coefficient) {
    double sum = 0.0;
    for (int64_t h = 0; h < p->heads; h++)
        for (int64_t i = 0; i < p->batch; i++) {
            int64_t at = h * p->batch + i;
            int here = !p->present || p->present[at];
            float found = here ? w[i] * (float)(factor[h] * scale) : 0.0f;
            sum += found * loss[at];
            coefficient[at] = found;
        }
    return sum;
}

/* How far a head by itself contradicts the target of a sample whose NLL it has. */
static double doubt_of(const Statistics *found, float nll, int64_t h, int64_t here, int64_t target) {
    int64_t at = h * found->near + here;
    float excess = nll - found->entropy[at];
    return found->prediction[at] != target && excess > 0.0f ? 1.0 - (double)expf(-excess) : 0.0;
}

/* Weigh the samples by what the state knows, then take the batch into it. Statistics are given,
 * or come from `work` as they are needed; coefficient may be where their nll or loss is. */
static int curriculum(const Problem *p, const Work *work, Statistics *found, State *s,
                      const Settings *o, float *coefficient, float *value) {
    int64_t B = p->batch, H = p->heads;
    const float *loss = found->loss, *nll = found->nll;
    double per_log = p->classes > 1 ? 1.0 / log((double)p->classes) : 0.0;
    int holds_out = o->held_out > 0.0;
    int64_t C = holds_out ? p->classes : 0;
    float *scratch = malloc((size_t)(B ? B : 1) * (3 * sizeof *scratch + 4) +
                            (size_t)C * sizeof *scratch);
    if (!scratch) return -1;
    float *log_weight = scratch, *difficulty = scratch + B, *part = scratch + 2 * B;
    float *pool = scratch + 3 * B;
    uint8_t *trained = (uint8_t *)(pool + C), *weighed = trained + B, *held = weighed + B;
    uint8_t *heard = held + B; /* held out, and finite */

    double volatility = 0.0, share[SIGNALS];
    for (int k = 0; k < SIGNALS; k++) volatility += s->volatility[k];
    for (int k = 0; k < SIGNALS; k++)
        share[k] = volatility > 0.0 ? s->volatility[k] / volatility : 1.0 / SIGNALS;
    double noise = o->label_noise < 0.0 ? *s->label_noise : o->label_noise;
    float shared = 1.0f - s->quality[0]; /* what fused logits hold of gated ones in training */
    double kappa = o->pacing_strength * shared;

    /* Signals of each sample; sums of those to be trained on, then of those to be held out. */
    Tally tally[2] = {{0}};
    int64_t nonfinite = 0, left_out = 0, rows = work ? work->rows : ROWS;
    double all = holds_out ? trained_on(p, s) : 0.0;
    uint64_t below = holds_out ? (uint64_t)nearbyint(o->held_out * 4294967296.0) : 0;
    Signals signals;
    uint8_t asked[MAX_HEADS];
    float head_weight[MAX_HEADS], usual[MAX_HEADS];
    find_witnesses(s->skill, H, asked);
    find_trust(s->skill, H, head_weight);
    double credible = o->label_noise < 0.0 ? clamp(4.0 * head_weight[0], 0.0, 1.0) : 1.0;
    double rho = o->surprise_strength * clamp(noise / 0.01, 0.0, 1.0) * credible;
    for (int64_t h = 0; h < H; h++) {
        head_weight[h] *= head_weight[h];
        usual[h] = s->seen[h] ? -s->log_quality[h] : INFINITY;
    }
    for (int64_t i = 0, from = 0; i < B; i++) {
        int64_t y = p->target[i], here = i - found->start, r;
        if (i == from) {
            int64_t left = B - i < rows ? B - i : rows;
            if (work) {
                found->start = i;
                statistics_of_rows(p, work, i, found);
                here = 0;
            }
            rows_of.signals(nll + i, p->present ? p->present + i : NULL, B, found->entropy + here,
                            found->distance + here, found->prediction + here, found->near, asked,
                            head_weight, usual, (float)per_log, H, left, &signals);
            from += left;
        }
        r = i % rows;
        int counts = y != p->ignore_index, finite = signals.finite[r];
        held[i] = holds_out && is_held_out(s->index[i], below);
        trained[i] = counts && !held[i];
        heard[i] = counts && held[i] && finite;
        weighed[i] = trained[i] && finite;
        nonfinite += counts && !finite;
        left_out += counts && (held[i] || (o->skip_nonfinite && !finite));
        if (!counts || !finite) continue;
        double says[SIGNALS] = {
            signals.deviation[r],
            signals.consistency[r],
            clamp(found->entropy[here] * per_log, 0.0, 1.0),
        };
        Tally *t = tally + held[i];
        double hard = 0.0;
        for (int k = 0; k < SIGNALS; k++) {
            t->signal[k] += says[k];
            hard += share[k] * says[k];
        }
        t->count++;
        double doubt = signals.agree[r] ? -signals.common[r] : 0.0;
        if (signals.agree[r] && found->prediction[here] != y) doubt += signals.doubt[r];
        t->contradicted += doubt;
        log_weight[i] = (float)-rho * signals.surprise[r];
        difficulty[i] = (float)hard;
        t->difficulty += difficulty[i];
        double believed = held[i] ? exp(clamp(log_weight[i], -LARGEST_LOG_WEIGHT, 0.0)) : 0.0;
        double slope[MAX_HEADS];
        if (held[i]) find_slopes(p, s->logit_weight, shared, nll, i, pool, slope);
        for (int64_t h = 0; held[i] && h < H; h++)
            if (is_there(p, h, i)) {
                int64_t prediction = found->prediction[h * found->near + here];
                float lost = bounded(nll[h * B + i]);
                t->said[SEEN][h] += 1.0;
                t->said[HITS][h] += prediction == y;
                t->said[CHANCE][h] += (double)(s->class_seen[group_of(prediction)] + 1) / all;
                t->said[NLL][h] += believed * lost;
                t->said[SLOPE][h] += believed * slope[h];
                t->said[DOUBT][h] += doubt;
                t->said[OWN_DOUBT][h] += doubt_of(found, lost, h, here, y);
            }
        if (holds_out && !held[i]) t->doubted += doubt_of(found, nll[i], 0, here, y);
    }
    const Tally *rest = tally, *heard_of = tally + 1;

    int64_t count = rest->count;
    double some = count ? (double)count : 1.0, spread = 0.0;
    double mean_difficulty = rest->difficulty / some;
    for (int64_t i = 0; i < B; i++)
        if (weighed[i]) spread += pow(difficulty[i] - mean_difficulty, 2.0);
    spread = sqrt(spread / some);
    spread = spread > 1e-4 ? spread : 1e-4;
    for (int64_t i = 0; i < B; i++) {
        double harder = weighed[i] ? difficulty[i] - mean_difficulty : 0.0;
        double found = weighed[i] ? log_weight[i] - kappa / spread * harder : 0.0;
        log_weight[i] = (float)clamp(found, -LARGEST_LOG_WEIGHT, LARGEST_LOG_WEIGHT);
    }
    float *weight = log_weight;
    weigh_in_classes(p, weighed, weight, s, o->decay);

    /* The running averages. */
    int first = s->seen[0] == 0, second = s->seen[0] == 1;
    float *used = difficulty; /* of what is there and weighed, else 0 */
    for (int64_t i = 0; i < B; i++) used[i] = weighed[i] ? weight[i] : 0.0f;
    double sums[MAX_HEADS][3]; /* of weights, of those times nll, of their squares */
    int64_t number[MAX_HEADS] = {0};
    for (int64_t h = 0; h < H; h++) {
        const float *mine = of_head(p, h, used, part);
        rows_of.weighted_sums(mine, nll + h * B, B, sums[h]);
        for (int64_t i = 0; i < B; i++) number[h] += mine[i] > 0.0f;
    }
    if (count) {
        double effective = sums[0][0] * sums[0][0] / (sums[0][2] * some);
        average(s->effective_share, effective, first, o->decay);
        for (int k = 0; k < SIGNALS; k++) {
            /* as it is kept, so that what stands still does not change */
            double now = (float)(rest->signal[k] / some), before = s->signal_mean[k];
            double change = first ? 0.0 : fabs(now - before) / (fabs(before) + 1e-3);
            average(s->volatility + k, change, second, o->decay);
            average(s->signal_mean + k, now, first, o->decay);
        }
        if (holds_out) average(s->doubted, rest->doubted / some, first, o->decay);
        /* Once any was held out, those trained on, known by heart, are not asked for it. */
        if (!holds_out && s->held_out[SEEN][0] == 0.0f)
            average(s->label_noise, rest->contradicted / some, 0, o->decay);
    }
    if (heard_of->count) listen(p, heard_of, o->held_out * (double)s->samples, s, o->decay);
    for (int64_t h = 0; h < s->heads; h++) {
        if (h < H && sums[h][0] > 0.0) {
            /* A batch moves it as far as it is weighed, or labels in doubt would count in small
             * ones. */
            double rate = (1.0 - o->decay) * clamp(sums[h][0] / (double)number[h], 0.0, 1.0);
            average(s->log_quality + h, -sums[h][1] / sums[h][0], s->seen[h] == 0, 1.0 - rate);
            s->seen[h]++;
        } else if (s->seen[h] == 0) {
            s->log_quality[h] = s->log_quality[0];
        }
        float learnt = (float)clamp(1.0 + s->log_quality[h] * per_log, 0.0, 1.0);
        s->quality[h] = per_log > 0.0 && s->seen[0] ? learnt : 0.0f;
    }
    *s->step += 1;
    *s->nonfinite += nonfinite;
    float known = p->smoothing > 0.0 || p->classes > GROUPS ? 0.0f : 1.0f;
    for (int64_t c = 0; c < GROUPS; c++)
        s->class_weight[c] = known && p->weight && c < p->classes ? p->weight[c] : known;
    for (int64_t i = 0; s->samples && i < B; i++) {
        int64_t row = s->index[i]; /* was in range, unless another thread has changed it */
        if (row < 0 || row >= s->samples) continue;
        for (int64_t h = 0; h < H; h++)
            if ((weighed[i] || heard[i]) && is_there(p, h, i)) {
                float *mean = s->memory_nll + row * s->heads + h, now = bounded(nll[h * B + i]);
                int32_t *visits = s->memory_visits + row * s->heads + h;
                double kept = *visits / (*visits + 1.0); /* at first, the mean of all visits */
                average(mean, now, 0, kept < o->memory_decay ? kept : o->memory_decay);
                *visits += *visits < INT32_MAX;
            }
        s->memory_weight[row] = weight[i];
    }

    /* Factor of every loss in the joint objective, and the objective. */
    double factor[MAX_HEADS] = {1.0}, scale = 1.0, sum = 0.0;
    int may_skip = holds_out || o->skip_nonfinite;
    if (H > 1) modality_coefficients(s->log_quality, H - 1, factor + 1);
    double best = best_of(s->skill, H);
    for (int64_t h = 1; h < H; h++) {
        factor[h] *= o->unimodal_strength * loss_share(s->skill[h], s->skill[0], best);
        double lost = (double)s->held_out[NLL][h] / s->held_out[SEEN][h];
        double held_out = per_log > 0.0 ? clamp(1.0 - lost * per_log, 0.0, 1.0) : 0.0;
        if (s->held_out[SEEN][h] > 0.0f) factor[h] *= generalisation(held_out, s->quality[h]);
    }
    if (o->reduction == REDUCE_MEAN) {
        double counted = 0.0;
        for (int64_t i = 0; i < B; i++)
            if (o->skip_nonfinite ? weighed[i] : trained[i])
                counted += p->weight ? p->weight[p->target[i]] : 1.0;
        /* Of a batch left out as a whole, 0. */
        scale = 1.0 / (counted == 0.0 && left_out ? (double)left_out : counted);
    }
    if (o->reduction == REDUCE_NONE && B) memset(value, 0, (size_t)B * sizeof *value);
    for (int64_t i = 0; i < B; i++)
        used[i] = held[i] || (o->skip_nonfinite && !weighed[i]) ? 0.0f : weight[i];
    int massless = !isfinite(scale);
    if (massless) sum = without_mass(p, used, factor, scale, loss, coefficient);
    for (int64_t h = massless ? H : 0; h < H; h++)
        sum += rows_of.coefficients(of_head(p, h, used, part), (float)(factor[h] * scale),
                                    loss + h * B, may_skip, B, coefficient + h * B,
                                    o->reduction == REDUCE_NONE ? value : NULL);
    if (o->reduction != REDUCE_NONE) *value = (float)sum;
    free(scratch);
    return 0;
}

typedef struct {
    double slope, threshold, swap, dropout;
} Gate;

/* Of each modality, [M]. */
typedef struct {
    double believed[MAX_HEADS];
    double able[MAX_HEADS];  /* to be contradicted */
    double rates[MAX_HEADS]; /* how often it is disturbed */
} Trust;

/* Share of what is learnt that modalities know on their own: of a state's log qualities, qualities
 * and skills of all heads, [M + 1]. */
static double redundancy_of(float *const *learnt, int64_t modalities) {
    double share = learnt[1][0] / pow(1.0 + exp(log_hmir_of(learnt[0], modalities)), 4.0);
    float shown[1 + MAX_HEADS];
    find_trust(learnt[2], 1 + modalities, shown);
    for (int64_t h = 0; h <= modalities; h++) shown[h] = (float)log(shown[h]);
    double of_shown = exp(shown[0]) / pow(1.0 + exp(log_hmir_of(shown, modalities)), 4.0);
    return share < of_shown ? share : of_shown;
}

/* How often a state has seen class c, times its class weight; 0 unless that is a number. */
static float mass_of(float *const *learnt, int64_t c) {
    const int64_t *seen = (const int64_t *)(void *)learnt[3];
    float mass = (float)seen[c] * learnt[4][c];
    return mass > 0.0f && mass < INFINITY ? mass : 0.0f;
}

/* How even the classes are that a state has seen. */
static double evenness_of(float *const *learnt) {
    double number = 0.0, total = 0.0, squares = 0.0;
    for (int64_t c = 0; c < GROUPS; c++) {
        double mass = mass_of(learnt, c);
        number += mass > 0.0;
        total += mass;
        squares += mass * mass;
    }
    double share = number > 0.0 ? total * total / (number * squares) : 1.0;
    return share * share * share * share;
}

/* How a modality compares with the best one. */
static double standing_of(double skill, double best) {
    return best > 0.0 ? clamp(2.0 * skill / best, 0.0, 1.0) : 1.0;
}

/* From the skill that a fusion has kept, and, if not NULL, what its state has learnt. */
static void trust_in(int64_t modalities, const float *skill, float *const *learnt, Trust *t) {
    const double eps = 1e-3;
    double worst = INFINITY, best = best_of(skill, modalities), share = 1.0;
    if (learnt) share = redundancy_of(learnt, modalities) * evenness_of(learnt);
    for (int64_t m = 0; m < modalities; m++) worst = skill[m] < worst ? skill[m] : worst;
    for (int64_t m = 0; m < modalities; m++) {
        t->believed[m] = best > 0.0 ? trust_of(skill[m]) : 1.0;
        t->able[m] = pow(standing_of(skill[m], best), 2.0);
        t->rates[m] = share * (1.0 - skill[m] + eps) / (1.0 - worst + eps);
    }
}

/* Uniform numbers in [0, 1), [3, B], or NULL; where modality m of sample i comes from. */
typedef struct {
    const float *chance;
    int64_t *source; /* [M, B] or NULL */
} Disturbance;

/* What sample i has, [M], of which there are `count`. */
static void disturb(const Problem *p, const Gate *o, const Disturbance *d, const double *rates,
                    int64_t i, int64_t count, uint8_t *has) {
    int64_t M = p->heads, B = p->batch;
    for (int64_t m = 0; d->source && m < M; m++) d->source[m * B + i] = i;
    if (count < 2) return;
    int64_t m = (int64_t)(d->chance[i] * (float)M); /* < M, of 1 - 2^-24 as well */
    double rate = rates[m], event = d->chance[B + i];
    int64_t other = (i + 1 + (int64_t)(d->chance[2 * B + i] * (float)(B - 1))) % B;
    int there = p->present ? p->present[m * B + other] : 1;
    if (d->source && event < o->swap * rate && has[m] && there) d->source[m * B + i] = other;
    if (event >= 1.0 - o->dropout * rate) has[m] = 0;
}

/* Skills, and what logits count next to the fused head's, of what a state has learnt. */
static void take_up(float *const *learnt, int64_t modalities, float *skill, float *logit_factor) {
    memcpy(skill, learnt[2] + 1, (size_t)modalities * sizeof *skill);
    for (int64_t m = 0; m < modalities; m++) {
        float relative = learnt[5][1 + m] / learnt[5][0];
        logit_factor[m] = relative < (float)MOST_WEIGHT ? relative : (float)MOST_WEIGHT;
    }
}

/* What is taken off the logits of each class, from what a state has seen of them. */
static void take_up_prior(float *const *learnt, float *log_prior) {
    double top = 0.0;
    for (int64_t c = 0; c < GROUPS; c++) {
        log_prior[c] = mass_of(learnt, c);
        top = log_prior[c] > top ? log_prior[c] : top;
    }
    for (int64_t c = 0; c < GROUPS; c++)
        if (log_prior[c] > 0.0f)
            log_prior[c] = (float)clamp(log(log_prior[c] / top), LOWEST_LOG_PRIOR, 0.0);
}

/* What that multiplies probabilities by, up to the last class; 0 from there on. */
static void odds_of(const float *log_prior, int64_t classes, float *odds) {
    for (int64_t c = 0; c < GROUPS; c++) odds[c] = c < classes ? -log_prior[c] : 0.0f;
    rows_of.exp_row(odds, classes);
}

/* Two modalities that contradict each other outvote nobody: the gate takes three. */
static int gate(const Problem *p, const Gate *o, const Disturbance *d, const Trust *t,
                const float *odds, const float *penalty, float *gates, float *scale) {
    int64_t M = p->heads, B = p->batch, padded = (p->classes + PADDING - 1) / PADDING * PADDING;
    float *probs = calloc((size_t)(M * padded), sizeof *probs);
    if (!probs) return -1;
    for (int64_t i = p->start; i < p->stop; i++) {
        uint8_t has[MAX_HEADS];
        double weight[MAX_HEADS];
        int64_t count = 0;
        for (int64_t m = 0; m < M; m++) count += has[m] = !p->present || p->present[m * B + i];
        if (d->chance) disturb(p, o, d, t->rates, i, count, has);
        count = 0;
        for (int64_t m = 0; m < M; m++) {
            weight[m] = has[m] ? t->believed[m] : 0.0;
            count += has[m];
        }
        for (int64_t m = 0; count > 2 && m < M; m++) {
            if (weight[m] == 0.0) continue;
            int64_t from = d->chance && d->source ? d->source[m * B + i] : i;
            float *e = probs + m * padded;
            Softmaxes f;
            rows_of.softmax_rows(p->logits[m] + from * p->stride[m], 0, 1, p->classes, e, 0, &f);
            if (odds) *f.inverse_total = 1.0f / rows_of.multiply(e, odds, padded);
            rows_of.scale_rows(e, 1, p->classes, f.inverse_total, NULL, NULL);
        }
        double evidence[MAX_HEADS], share[MAX_HEADS], total = 0.0, kept = 0.0;
        double top = -INFINITY, highest = -INFINITY;
        for (int64_t m = 0; m < M; m++) {
            if (weight[m] == 0.0) continue;
            float others[MAX_HEADS];
            double sum = 0.0, squares = 0.0, found = 0.0;
            for (int64_t k = 0; k < M; k++) {
                sum += k == m ? 0.0 : weight[k];
                squares += k == m ? 0.0 : weight[k] * weight[k];
            }
            for (int64_t k = 0; k < M; k++) others[k] = (float)(weight[k] / sum);
            if (count > 2)
                found = rows_of.contradiction(probs, padded, M, m, others, p->classes) *
                        (squares / sum) * t->able[m];
            evidence[m] = -o->slope * found;
            top = evidence[m] > top ? evidence[m] : top;
        }
        for (int64_t m = 0; m < M; m++)
            if (weight[m] > 0.0) total += share[m] = exp(evidence[m] - top);
        for (int64_t m = 0; m < M; m++) {
            if (weight[m] > 0.0 && share[m] / total < o->threshold) weight[m] = 0.0;
            if (weight[m] == 0.0) continue;
            if (penalty) evidence[m] -= penalty[m * B + i];
            highest = evidence[m] > highest ? evidence[m] : highest;
        }
        for (int64_t m = 0; m < M; m++)
            kept += share[m] = weight[m] > 0.0 ? exp(evidence[m] - highest) : 0.0;
        for (int64_t m = 0; m < M; m++) {
            gates[m * B + i] = count ? (float)(share[m] / kept) : 0.0f;
            scale[m * B + i] = (float)share[m]; /* the largest is 1 */
        }
    }
    free(probs);
    return 0;
}

/* to = factor * from; for a factor of 0 it is 0, whatever `from` holds. */
static void scale_into(float *restrict to, const float *restrict from, int64_t count,
                       float factor) {
    if (factor == 0.0f) memset(to, 0, (size_t)count * sizeof *to);
    for (int64_t k = 0; factor != 0.0f && k < count; k++) to[k] = factor * from[k];
}

/* Streams, [B, steps, width], next to each other in whole, [B, steps, sum width], each sample
 * times its factor, [M, B]; or the other way. */
static void mix_streams(float *const *streams, const int64_t *width, float *whole, int64_t M,
                        int64_t B, int64_t steps, const float *factor, int backward) {
    for (int64_t row = 0; row < B * steps; row++)
        for (int64_t m = 0; m < M; m++) {
            float *part = streams[m] + row * width[m], f = factor[m * B + row / steps];
            scale_into(backward ? part : whole, backward ? whole : part, width[m], f);
            whole += width[m];
        }
}

/* Logits, [B, C], less the prior, [C], if it is not NULL, times their factors, [M, B], and those of
 * their modalities, [M], added up. */
static void mix_logits(float *const *logits, float *sum, int64_t M, int64_t B, int64_t classes,
                       const float *factor, const float *logit_factor, const float *prior) {
    for (int64_t i = 0; i < B; i++, sum += classes) {
        float whole = 0.0f;
        for (int64_t m = 0; m < M; m++) {
            float *part = logits[m] + i * classes, f = factor[m * B + i] * logit_factor[m];
            whole += f;
            if (m == 0) scale_into(sum, part, classes, f);
            else if (f != 0.0f)
                for (int64_t c = 0; c < classes; c++) sum[c] += f * part[c];
        }
        for (int64_t c = 0; prior && c < classes; c++) sum[c] -= whole * prior[c];
    }
}

/* Features of one modality, [B, width] with any strides. */
typedef struct {
    const float *x;
    int64_t batch, width, row_stride, column_stride;
} Features;

/* Take one modality's features into its moments; those that count end up in scratch,
 * [B, WATCHED]. */
static void observe(const Features *f, const uint8_t *available, double window, int64_t width,
                    float *scratch, float *mass, float *total, float *scatter) {
    double sum[WATCHED] = {0};
    int64_t counted = 0;
    memset(scratch, 0, (size_t)(f->batch * WATCHED) * sizeof *scratch);
    for (int64_t i = 0; i < f->batch; i++) {
        if (available && !available[i]) continue;
        float *row = scratch + counted * WATCHED; /* the next one's, if this does not count */
        double squares[LANES_OF_SUM] = {0}, squared = 0.0;
        for (int64_t k = 0; k < f->width; k++)
            row[k] = f->x[i * f->row_stride + k * f->column_stride];
        for (int k = 0; k < WATCHED; k += LANES_OF_SUM)
            for (int j = 0; j < LANES_OF_SUM; j++)
                squares[j] += (double)row[k + j] * row[k + j];
        for (int j = 0; j < LANES_OF_SUM; j++) squared += squares[j];
        if (!(squared < LARGEST_SQUARE)) continue;
        for (int k = 0; k < WATCHED; k++) sum[k] += row[k];
        counted++;
    }
    if (!counted) return;
    double rate = counted / (counted + window), weight = rate / (double)counted;
    float mean[WATCHED] = {0};
    *mass += (float)((1.0 - *mass) * rate);
    for (int64_t k = 0; k < f->width; k++) {
        total[k] += (float)(weight * sum[k] - rate * total[k]);
        mean[k] = total[k] / *mass;
    }
    float scale = (float)sqrt(weight); /* before squaring, so that no sum overflows */
    for (int64_t i = 0; i < counted; i++)
        for (int k = 0; k < WATCHED; k++)
            scratch[i * WATCHED + k] = scale * (scratch[i * WATCHED + k] - mean[k]);
    for (int64_t k = 0; k < f->width * width; k++) scatter[k] *= (float)(1.0 - rate);
    for (int64_t i = 0; i < counted; i += BLOCK) {
        float products[WATCHED * WATCHED];
        int64_t rows = counted - i < BLOCK ? counted - i : BLOCK;
        rows_of.products(scratch + i * WATCHED, rows, f->width, products);
        for (int64_t a = 0; a < f->width; a++)
            for (int64_t b = 0; b < f->width; b++)
                scatter[a * width + b] += products[a * WATCHED + b];
    }
}

/* The upper factor R of R^T R = a, [n, n] in rows of WATCHED; NaN unless that is positive
 * definite. */
static void factorise(double *a, int64_t n) {
    for (int64_t k = 0; k < n; k++) {
        double *row = a + k * WATCHED, pivot = row[k] > 0.0 ? sqrt(row[k]) : NAN;
        for (int64_t j = k; j < n; j++) row[j] /= pivot;
        for (int64_t i = k + 1; i < n; i++)
            for (int64_t j = i; j < n; j++) a[i * WATCHED + j] -= row[i] * row[j];
    }
}

/* How far one modality's features lie from those in its moments, [B]. */
static void novelty(const Features *f, double window, int64_t width, float mass,
                    const float *total, const float *scatter, float *out) {
    int64_t n = f->width;
    double a[WATCHED * WATCHED], mean[WATCHED], size = 0.0, variance = 0.0, trace = 0.0;
    double seen = mass > SMALLEST_NORMAL ? mass : SMALLEST_NORMAL;
    for (int64_t k = 0; k < n; k++) {
        mean[k] = total[k] / seen;
        size += mean[k] * mean[k] / (double)n;
        variance += scatter[k * width + k] / seen / (double)n;
    }
    if (!(mass * window > SAMPLES_PER_FEATURE * (double)n &&
          variance > SMALLEST_VARIANCE * size + SMALLEST_NORMAL)) {
        for (int64_t i = 0; i < f->batch; i++) out[i] = 1.0f;
        return;
    }
    float factor[WATCHED * WATCHED], x[WATCHED * ROWS], squared[ROWS];
    for (int64_t k = 0; k < n; k++) {
        for (int64_t j = k; j < n; j++) a[k * WATCHED + j] = scatter[k * width + j] / seen;
        a[k * WATCHED + k] += SHRINKAGE * variance;
    }
    factorise(a, n);
    for (int64_t k = 0; k < n; k++)
        for (int64_t j = k; j < n; j++) factor[k * WATCHED + j] = (float)a[k * WATCHED + j];
    for (int64_t from = 0; from < n; from += ROWS) { /* of the inverse, its mean over training */
        for (int64_t k = 0; k < n; k++)
            for (int r = 0; r < ROWS; r++) x[k * ROWS + r] = k == from + r ? 1.0f : 0.0f;
        rows_of.whiten(factor, n, x, squared);
        for (int r = 0; r < ROWS; r++) trace += squared[r];
    }
    double expected = (double)n - SHRINKAGE * variance * trace;
    for (int64_t from = 0; from < f->batch; from += ROWS) {
        int64_t rows = f->batch - from < ROWS ? f->batch - from : ROWS;
        const float *at = f->x + from * f->row_stride;
        memset(x, 0, sizeof x);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t k = 0; k < n; k++)
                x[k * ROWS + r] = (float)(at[r * f->row_stride + k * f->column_stride] - mean[k]);
        rows_of.whiten(factor, n, x, squared);
        for (int64_t r = 0; r < rows; r++) {
            double found = squared[r] / expected;
            out[from + r] = found < MOST_NOVEL ? (float)found : MOST_NOVEL; /* or NaN */
        }
    }
}

/* The boundary: addresses and numbers in, a status out. native.py keeps the tensors alive. */

static void *address(PyObject *number) { return PyLong_AsVoidPtr(number); }

static int64_t integer(PyObject *number) { return PyLong_AsLongLong(number); }

#define PROBLEM_ARGUMENTS 11

static Problem problem_from(PyObject *const *args) {
    Problem p = {0};
    p.heads = PyList_Size(args[0]);
    if (p.heads > MAX_HEADS) PyErr_SetString(PyExc_ValueError, "too many heads");
    for (int64_t h = 0; h < p.heads && h < MAX_HEADS; h++) {
        p.logits[h] = address(PyList_GetItem(args[0], h));
        p.stride[h] = integer(PyList_GetItem(args[1], h));
    }
    p.batch = integer(args[2]);
    p.classes = integer(args[3]);
    p.start = integer(args[4]);
    p.stop = integer(args[5]);
    p.target = address(args[6]);
    p.present = address(args[7]);
    p.weight = address(args[8]);
    p.ignore_index = integer(args[9]);
    p.smoothing = PyFloat_AsDouble(args[10]);
    return p;
}

static int arguments_are(Py_ssize_t got, Py_ssize_t expected) {
    if (got == expected) return 1;
    PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, got);
    return 0;
}

/* The name of the argument that is out of range, or None. */
static PyObject *answer(int failed, const char *rejected) {
    if (failed) return PyErr_NoMemory();
    if (rejected) return PyUnicode_FromString(rejected);
    Py_RETURN_NONE;
}

static PyObject *py_statistics(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (!arguments_are(count, PROBLEM_ARGUMENTS + 3)) return NULL;
    Problem p = problem_from(args);
    args += PROBLEM_ARGUMENTS;
    float *rows = address(args[0]);
    int64_t *prediction = address(args[1]);
    double *lse = address(args[2]);
    if (PyErr_Occurred()) return NULL;
    if (!target_fits(&p)) return answer(0, "target");
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = statistics(&p, rows, prediction, lse);
    Py_END_ALLOW_THREADS
    return answer(failed, NULL);
}

static void addresses(PyObject *list, float **out) {
    Py_ssize_t count = PyList_Size(list);
    for (Py_ssize_t h = 0; h < count && h < MAX_HEADS; h++)
        out[h] = address(PyList_GetItem(list, h));
}

/* Without saved normalisers the softmaxes are computed anew, as py_curriculum does. */
static PyObject *py_gradients(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (!arguments_are(count, PROBLEM_ARGUMENTS + 7)) return NULL;
    Problem p = problem_from(args);
    args += PROBLEM_ARGUMENTS;
    const float *grad = address(args[0]);
    int64_t head_stride = integer(args[1]), sample_stride = integer(args[2]);
    const float *coefficient = address(args[3]);
    const double *lse = address(args[4]);
    int guard = PyObject_IsTrue(args[5]);
    float *out[MAX_HEADS];
    addresses(args[6], out);
    if (PyErr_Occurred()) return NULL;
    if (!target_fits(&p)) return answer(0, "target"); /* whoever shares its memory may write it */
    Py_BEGIN_ALLOW_THREADS
    if (lse) {
        gradients(&p, grad, head_stride, sample_stride, coefficient, lse, guard, out);
    } else {
        Work w;
        work_for(&p, out, &w);
        for (int64_t h = 0; h < p.heads; h++)
            for (int64_t i = 0; i < p.batch; i += w.rows) {
                int64_t rows = p.batch - i < w.rows ? p.batch - i : w.rows;
                float *e = probs_of(&p, &w, h, i);
                Softmaxes f;
                rows_of.softmax_rows(p.logits[h] + i * p.stride[h], p.stride[h], rows, p.classes,
                                     e, p.classes, &f);
                rows_of.scale_rows(e, rows, p.classes, f.inverse_total, NULL, NULL);
            }
        finish_gradients(&p, coefficient, guard, out);
        scale(p.heads, p.batch, p.classes, grad, head_stride, sample_stride, guard, out);
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_scale(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (!arguments_are(count, 7)) return NULL;
    float *out[MAX_HEADS];
    addresses(args[0], out);
    int64_t heads = PyList_Size(args[0]), batch = integer(args[1]), classes = integer(args[2]);
    const float *grad = address(args[3]);
    int64_t head_stride = integer(args[4]), sample_stride = integer(args[5]);
    int guard = PyObject_IsTrue(args[6]);
    if (PyErr_Occurred()) return NULL;
    Py_BEGIN_ALLOW_THREADS
    scale(heads, batch, classes, grad, head_stride, sample_stride, guard, out);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static State state_from(int64_t heads, PyObject *buffers, PyObject *memory) {
    State s = {0};
    PyObject *of[16];
    for (int k = 0; k < 16; k++) of[k] = PyList_GetItem(buffers, k);
    s.heads = heads;
    s.log_quality = address(of[0]);
    s.quality = address(of[1]);
    s.seen = address(of[2]);
    s.signal_mean = address(of[3]);
    s.volatility = address(of[4]);
    s.label_noise = address(of[5]);
    s.doubted = address(of[6]);
    s.effective_share = address(of[7]);
    s.step = address(of[8]);
    s.nonfinite = address(of[9]);
    float *held_out = address(of[10]);
    for (int k = 0; k < SAID; k++) s.held_out[k] = held_out + k * heads;
    s.skill = address(of[11]);
    s.logit_weight = address(of[12]);
    s.log_class_average = address(of[13]);
    s.class_seen = address(of[14]);
    s.class_weight = address(of[15]);
    if (memory != Py_None) {
        s.samples = integer(PyList_GetItem(memory, 0));
        s.index = address(PyList_GetItem(memory, 1));
        s.memory_nll = address(PyList_GetItem(memory, 2));
        s.memory_visits = address(PyList_GetItem(memory, 3));
        s.memory_weight = address(PyList_GetItem(memory, 4));
    }
    return s;
}

static Settings settings_from(PyObject *settings) {
    PyObject *of[9];
    for (int k = 0; k < 9; k++) of[k] = PyTuple_GetItem(settings, k);
    Settings o = {0};
    o.surprise_strength = PyFloat_AsDouble(of[0]);
    o.label_noise = of[1] == Py_None ? -1.0 : PyFloat_AsDouble(of[1]);
    o.pacing_strength = PyFloat_AsDouble(of[2]);
    o.unimodal_strength = PyFloat_AsDouble(of[3]);
    o.skip_nonfinite = PyObject_IsTrue(of[4]);
    o.decay = PyFloat_AsDouble(of[5]);
    o.memory_decay = PyFloat_AsDouble(of[6]);
    if (!PyUnicode_Check(of[7])) PyErr_SetString(PyExc_TypeError, "reduction: expected a string");
    else
        o.reduction = PyUnicode_CompareWithASCIIString(of[7], "mean") == 0   ? REDUCE_MEAN
                      : PyUnicode_CompareWithASCIIString(of[7], "none") == 0 ? REDUCE_NONE
                                                                             : REDUCE_SUM;
    o.held_out = PyFloat_AsDouble(of[8]);
    return o;
}

/* Statistics may be given; when they are not, one call does all. Gradients for an incoming one of
 * 1, too, when there is room for them, `ahead`. */
static PyObject *py_curriculum(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (!arguments_are(count, PROBLEM_ARGUMENTS + 10)) return NULL;
    Problem p = problem_from(args);
    args += PROBLEM_ARGUMENTS;
    float *rows = address(args[0]);
    int64_t *prediction = address(args[1]);
    double *lse = address(args[2]);
    State s = state_from(integer(args[3]), args[4], args[5]);
    Settings o = settings_from(args[6]);
    float *coefficient = address(args[7]), *value = address(args[8]);
    float *out[MAX_HEADS], **ahead = args[9] == Py_None ? NULL : out;
    if (ahead) addresses(args[9], out);
    if (PyErr_Occurred()) return NULL;
    if (!target_fits(&p)) return answer(0, "target");
    for (int64_t i = 0; s.samples && i < p.batch; i++)
        if (s.index[i] < 0 || s.index[i] >= s.samples) return answer(0, "index");
    int failed;
    Py_BEGIN_ALLOW_THREADS
    int64_t plane = p.heads * p.batch;
    Statistics found = {rows,       rows + plane, rows + 2 * plane, rows + 3 * plane,
                        prediction, NULL,         p.batch,          0};
    if (rows) {
        failed = curriculum(&p, NULL, &found, &s, &o, coefficient, value);
    } else {
        /* Where coefficients will be, nll is until then, and the loss where it is the same. */
        int weighted = p.weight || p.smoothing > 0.0;
        int guard = p.present || o.skip_nonfinite || o.held_out > 0.0;
        float *loss = weighted ? malloc((size_t)(plane + 1) * sizeof *loss) : coefficient;
        float entropy[MAX_HEADS * ROWS], distance[MAX_HEADS * ROWS];
        int64_t of_rows[MAX_HEADS * ROWS];
        found = (Statistics){loss, coefficient, entropy, distance, of_rows, lse, ROWS, 0};
        Work w = {0};
        failed = weighted && !loss ? -1 : work_for(&p, ahead, &w);
        if (!failed) failed = curriculum(&p, &w, &found, &s, &o, coefficient, value);
        if (!failed && ahead)
            finish_gradients(&p, coefficient, guard, out);
        if (weighted) free(loss);
        free(w.scratch);
    }
    Py_END_ALLOW_THREADS
    return answer(failed, NULL);
}

static PyObject *py_gate(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (!arguments_are(count, PROBLEM_ARGUMENTS + 10)) return NULL;
    Problem p = problem_from(args);
    args += PROBLEM_ARGUMENTS;
    float *skill = address(args[0]), *logit_factor = address(args[1]), *prior = address(args[2]);
    float *learnt[MAX_HEADS];
    int takes_up = args[3] != Py_None, compares = prior && p.heads > 2; /* two outvote nobody */
    if (takes_up) addresses(args[3], learnt);
    const float *penalty = address(args[5]);
    Disturbance d = {address(args[4]), address(args[6])};
    Gate o;
    double *of[4] = {&o.slope, &o.threshold, &o.swap, &o.dropout};
    for (int k = 0; k < 4; k++) *of[k] = PyFloat_AsDouble(PyTuple_GetItem(args[7], k));
    float *gates = address(args[8]), *scale = address(args[9]);
    if (PyErr_Occurred()) return NULL;
    Trust t;
    trust_in(p.heads, takes_up ? learnt[2] + 1 : skill, takes_up && d.chance ? learnt : NULL, &t);
    int failed;
    float log_prior[GROUPS], odds[GROUPS];
    Py_BEGIN_ALLOW_THREADS
    if (prior && takes_up) take_up_prior(learnt, log_prior);
    if (compares) odds_of(takes_up ? log_prior : prior, p.classes, odds);
    failed = gate(&p, &o, &d, &t, compares ? odds : NULL, penalty, gates, scale);
    if (takes_up && p.start == 0) { /* once, of several parts */
        take_up(learnt, p.heads, skill, logit_factor);
        if (prior) memcpy(prior, log_prior, sizeof log_prior);
    }
    Py_END_ALLOW_THREADS
    return answer(failed, NULL);
}

/* With `backward`, streams are what is written. */
static PyObject *py_mix(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (!arguments_are(count, 12)) return NULL;
    float *streams[MAX_HEADS], *logits[MAX_HEADS];
    int64_t modalities = PyList_Size(args[2]), width[MAX_HEADS];
    if (modalities > MAX_HEADS) PyErr_SetString(PyExc_ValueError, "too many modalities");
    addresses(args[0], streams);
    addresses(args[1], logits);
    for (int64_t m = 0; m < modalities && m < MAX_HEADS; m++)
        width[m] = integer(PyList_GetItem(args[2], m));
    int64_t batch = integer(args[3]), steps = integer(args[4]), classes = integer(args[5]);
    float *fused = address(args[6]), *sum = address(args[7]);
    const float *scale = address(args[8]), *logit_factor = address(args[9]);
    const float *prior = address(args[10]);
    int backward = PyObject_IsTrue(args[11]);
    if (PyErr_Occurred()) return NULL;
    Py_BEGIN_ALLOW_THREADS
    mix_streams(streams, width, fused, modalities, batch, steps, scale, backward);
    if (sum) mix_logits(logits, sum, modalities, batch, classes, scale, logit_factor, prior);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* Features of all modalities and their moments. */
typedef struct {
    int64_t modalities, batch, width; /* width: of the moments */
    double window;
    Features of[MAX_HEADS];
    float *mass, *total, *scatter;
} Watched;

#define WATCHED_ARGUMENTS 7

static Watched watched_from(PyObject *const *args) {
    Watched w = {0};
    w.modalities = PyList_Size(args[0]);
    w.window = PyFloat_AsDouble(args[2]);
    w.width = integer(args[3]);
    w.mass = address(args[4]);
    w.total = address(args[5]);
    w.scatter = address(args[6]);
    int fits = w.modalities <= MAX_HEADS && w.width <= WATCHED;
    for (int64_t m = 0; fits && m < w.modalities; m++) {
        PyObject *shape = PyList_GetItem(args[1], m);
        Features *f = w.of + m;
        f->x = address(PyList_GetItem(args[0], m));
        int64_t step, *to[5] = {&f->batch, &f->width, &f->row_stride, &f->column_stride, &step};
        for (int k = 0; k < 5; k++) *to[k] = integer(PyTuple_GetItem(shape, k));
        w.batch = f->batch;
        fits = step > 0 && (f->width = (f->width + step - 1) / step) <= w.width;
        f->column_stride *= step;
    }
    if (!fits) PyErr_SetString(PyExc_ValueError, "too many features");
    return w;
}

static PyObject *py_observe(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (!arguments_are(count, WATCHED_ARGUMENTS + 1)) return NULL;
    Watched w = watched_from(args);
    const uint8_t *available = address(args[WATCHED_ARGUMENTS]);
    if (PyErr_Occurred()) return NULL;
    float *scratch = malloc((size_t)(w.batch * WATCHED + 1) * sizeof *scratch);
    if (!scratch) return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    for (int64_t m = 0; m < w.modalities; m++)
        observe(w.of + m, available ? available + m * w.batch : NULL, w.window, w.width, scratch,
                w.mass + m, w.total + m * w.width, w.scatter + m * w.width * w.width);
    Py_END_ALLOW_THREADS
    free(scratch);
    Py_RETURN_NONE;
}

static PyObject *py_novelty(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (!arguments_are(count, WATCHED_ARGUMENTS + 1)) return NULL;
    Watched w = watched_from(args);
    float *out = address(args[WATCHED_ARGUMENTS]);
    if (PyErr_Occurred()) return NULL;
    Py_BEGIN_ALLOW_THREADS
    for (int64_t m = 0; m < w.modalities; m++)
        novelty(w.of + m, w.window, w.width, w.mass[m], w.total + m * w.width,
                w.scatter + m * w.width * w.width, out + m * w.batch);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

#define FAST(function) (PyCFunction)(void (*)(void))function, METH_FASTCALL

static PyMethodDef methods[] = {
    {"statistics", FAST(py_statistics), NULL},
    {"curriculum", FAST(py_curriculum), NULL},
    {"gradients", FAST(py_gradients), NULL},
    {"scale", FAST(py_scale), NULL},
    {"gate", FAST(py_gate), NULL},
    {"mix", FAST(py_mix), NULL},
    {"observe", FAST(py_observe), NULL},
    {"novelty", FAST(py_novelty), NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_native", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) {
    choose_kernels();
    PyObject *created = PyModule_Create(&module);
    if (created && (PyModule_AddIntConstant(created, "INTERFACE", INTERFACE) ||
                    PyModule_AddStringConstant(created, "CAPABILITY", capability)))
        Py_CLEAR(created);
    return created;
}
