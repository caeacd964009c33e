/* popularity, token_table, history and naive_bayes. */
#include "internal.h"

#include <math.h>

enum { BUCKETS = 8, MOST_DISTANCE = 20000 };
static const double DECAY = 0.97, PRIOR = 24;
static const double AGE_EDGES[BUCKETS - 1] = {1, 2, 3, 5, 9, 17, 33};

typedef struct { float *logits; double *shares; int64_t *counts; } Popularity; /* (L, E) each */
typedef struct { int64_t tokens, *ids, *occurrences, *table; double backoff; float *popularity; } Table;
typedef struct { Popularity popularity; float *table; double edges[BUCKETS - 1]; } History; /* table (8, 8) */

typedef struct {
    Table table;
    History past;
    Size ahead, sources, distances;
    float token, history;
    float *ratios; /* (distances, L, E, E) */
} NaiveBayes;

typedef struct { double *count, weight, *age; float *logits; } LayerPast; /* (E) each */
typedef struct { LayerPast *past; float *logits; } CountingState;         /* logits: (ahead, L, E) */

/* Uses of an expert by one imaginary token, which uses all experts evenly. */
static double uniform_share(const mb_predictor *p)
{
    return (double)p->top_k / (double)p->experts;
}

static double logit(double share, double bound)
{
    share = fmin(fmax(share, bound), 1 - bound);
    return log(share / (1 - share));
}

static float logit_float(float share, float bound)
{
    share = fminf(fmaxf(share, bound), 1 - bound);
    return logf(share / (1 - share));
}

/* Read (counts + K / E) / (tokens + 1). */
static Popularity read_popularity(Loader *loader, const char *prefix)
{
    const mb_predictor *p = loader->predictor;
    int64_t tokens = *integers(loader, 0, INT64_MAX - 1, SCALAR, "%stokens", prefix);
    int64_t *counts = integers(loader, 0, tokens, SHAPE(p->layers, p->experts), "%scounts", prefix);
    Size total = p->layers * p->experts;
    Popularity popularity = {keep(loader, total, sizeof(float)), keep(loader, total, sizeof(double)), counts};
    for (Size i = 0; i < total; i++) {
        popularity.shares[i] = ((double)counts[i] + uniform_share(p)) / (double)(tokens + 1);
        popularity.logits[i] = (float)logit(popularity.shares[i], 1e-9);
    }
    return popularity;
}

static Table read_table(Loader *loader, const char *prefix)
{
    const mb_predictor *p = loader->predictor;
    Size total = p->layers * p->experts;
    Table table = {.backoff = number(loader, loader->arguments, "backoff")};
    table.tokens = first_size(loader, "%stoken_ids", prefix);
    table.ids = integers(loader, -1, INT64_MAX, SHAPE(table.tokens), "%stoken_ids", prefix);
    table.occurrences = integers(loader, 0, INT32_MAX, SHAPE(table.tokens), "%soccurrences", prefix);
    table.table = integers(loader, 0, INT32_MAX, SHAPE(table.tokens, p->layers, p->experts), "%stable", prefix);
    if (!table.tokens || table.ids[0] != -1)
        fail(loader, "%stoken_ids does not begin with -1", prefix);
    double occurrences = 1;
    table.popularity = keep(loader, total, sizeof(float));
    for (Size row = 0; row < table.tokens; row++) {
        occurrences += (double)table.occurrences[row];
        if (row && table.ids[row] <= table.ids[row - 1])
            fail(loader, "%stoken_ids is not ascending", prefix);
    }
    for (Size i = 0; i < total; i++) {
        double uses = 0;
        for (Size row = 0; row < table.tokens; row++)
            uses += (double)table.table[row * total + i];
        table.popularity[i] = (float)(uses + uniform_share(p)) / (float)occurrences;
    }
    return table;
}

static History read_history(Loader *loader, const char *prefix)
{
    const mb_predictor *p = loader->predictor;
    History history = {.popularity = read_popularity(loader, prefix)};
    int64_t *trials = integers(loader, 0, INT64_MAX - 2, SHAPE(BUCKETS, BUCKETS), "%strials", prefix);
    int64_t *uses = integers(loader, 0, INT64_MAX - 2, SHAPE(BUCKETS, BUCKETS), "%suses", prefix);
    history.table = keep(loader, BUCKETS * BUCKETS, sizeof(float));
    for (Size i = 0; i < BUCKETS * BUCKETS; i++)
        history.table[i] = (float)logit(((double)uses[i] + 2 * uniform_share(p)) / ((double)trials[i] + 2), 1e-9);
    for (Size i = 0; i < BUCKETS - 1; i++)
        history.edges[i] = 0.045 * pow(0.3 / 0.045, (double)i / 6);
    return history;
}

/* Logit of an expert given the token's row of the table. */
static float table_logit(const Table *table, Size total, int64_t row, Size expert)
{
    float weight = (float)table->occurrences[row] + (float)table->backoff, popularity = table->popularity[expert];
    float uses = (float)table->table[row * total + expert];
    return logit_float(weight > 0 ? (uses + (float)table->backoff * popularity) / weight : popularity, 1e-6f);
}

static int64_t table_row(const Table *table, int64_t token_id)
{
    Size row = find_id(table->ids, table->tokens, token_id);
    return row < 0 ? 0 : row;
}

/* The past of a sequence */

static void look_up(const History *history, LayerPast *past, const double *popularity, Size experts)
{
    for (Size i = 0; i < experts; i++) {
        double rate = (PRIOR * popularity[i] + past->count[i]) / (PRIOR + past->weight);
        Size age_bucket = 0, rate_bucket = 0;
        for (Size edge = 0; edge < BUCKETS - 1; edge++) {
            age_bucket += past->age[i] >= AGE_EDGES[edge];
            rate_bucket += rate >= history->edges[edge];
        }
        past->logits[i] = history->table[age_bucket * BUCKETS + rate_bucket];
    }
}

static void make_past(mb_stepper *stepper)
{
    const mb_predictor *p = stepper->predictor;
    Arena *arena = &stepper->arena;
    CountingState *state = stepper->state = arena_take(arena, 1, sizeof *state);
    if (!state)
        return;
    state->past = arena_take(arena, p->layers, sizeof *state->past);
    for (Size layer = 0; state->past && layer < p->layers; layer++) {
        state->past[layer].count = arena_take(arena, p->experts, sizeof(double));
        state->past[layer].age = arena_take(arena, p->experts, sizeof(double));
        state->past[layer].logits = arena_take(arena, p->experts, sizeof(float));
    }
}

static void reset_past(const mb_predictor *p, const History *history, CountingState *state)
{
    for (Size layer = 0; layer < p->layers; layer++) {
        LayerPast *past = &state->past[layer];
        past->weight = 0;
        for (Size i = 0; i < p->experts; i++)
            past->count[i] = 0, past->age[i] = -INFINITY; /* never used */
        look_up(history, past, history->popularity.shares + layer * p->experts, p->experts);
    }
}

static void add_to_past(const mb_predictor *p, const History *history, CountingState *state, Size layer,
                        const int32_t *experts, Size count)
{
    LayerPast *past = &state->past[layer];
    past->weight = past->weight * DECAY + 1;
    for (Size i = 0; i < p->experts; i++)
        past->count[i] *= DECAY, past->age[i] += 1;
    for (Size i = 0; i < count; i++)
        past->count[experts[i]] += 1, past->age[experts[i]] = 1;
    look_up(history, past, history->popularity.shares + layer * p->experts, p->experts);
}

/* popularity */

static void make_nothing(mb_stepper *stepper)
{
    (void)stepper;
}

static void reset_nothing(mb_stepper *stepper)
{
    (void)stepper;
}

static void route_nothing(mb_stepper *stepper, Size layer, const int32_t *experts, Size count)
{
    (void)stepper, (void)layer, (void)experts, (void)count;
}

static void start_popularity(mb_stepper *stepper, int64_t token_id)
{
    const Popularity *popularity = stepper->predictor->weights;
    (void)token_id;
    for (Size layer = 0; layer < stepper->predictor->layers; layer++)
        set_scores(stepper, layer, 0, popularity->logits + layer * stepper->predictor->experts);
}

static const Architecture POPULARITY = {make_nothing, reset_nothing, start_popularity, route_nothing};

void load_popularity(Loader *loader)
{
    Popularity *popularity = keep(loader, 1, sizeof *popularity);
    *popularity = read_popularity(loader, "");
    loader->predictor->weights = popularity;
    loader->predictor->architecture = &POPULARITY;
    loader->predictor->lookaheads = 1;
    loader->predictor->reads_token_ids = 0;
}

/* token_table */

static void start_table(mb_stepper *stepper, int64_t token_id)
{
    const mb_predictor *p = stepper->predictor;
    const Table *table = p->weights;
    int64_t row = table_row(table, token_id);
    Size total = p->layers * p->experts;
    for (Size i = 0; i < total; i++)
        stepper->logits[i] = table_logit(table, total, row, i);
    for (Size layer = 0; layer < p->layers; layer++)
        set_scores(stepper, layer, 0, stepper->logits + layer * p->experts);
}

static const Architecture TOKEN_TABLE = {make_nothing, reset_nothing, start_table, route_nothing};

void load_token_table(Loader *loader)
{
    Table *table = keep(loader, 1, sizeof *table);
    *table = read_table(loader, "");
    loader->predictor->weights = table;
    loader->predictor->architecture = &TOKEN_TABLE;
    loader->predictor->lookaheads = 1;
}

/* history */

static void reset_history(mb_stepper *stepper)
{
    reset_past(stepper->predictor, stepper->predictor->weights, stepper->state);
}

static void start_history(mb_stepper *stepper, int64_t token_id)
{
    const CountingState *state = stepper->state;
    (void)token_id;
    for (Size layer = 0; layer < stepper->predictor->layers; layer++)
        set_scores(stepper, layer, 0, state->past[layer].logits);
}

static void route_history(mb_stepper *stepper, Size layer, const int32_t *experts, Size count)
{
    add_to_past(stepper->predictor, stepper->predictor->weights, stepper->state, layer, experts, count);
}

static const Architecture HISTORY = {make_past, reset_history, start_history, route_history};

void load_history(Loader *loader)
{
    History *history = keep(loader, 1, sizeof *history);
    *history = read_history(loader, "");
    loader->predictor->weights = history;
    loader->predictor->architecture = &HISTORY;
    loader->predictor->lookaheads = 1;
    loader->predictor->reads_token_ids = 0;
}

/* naive_bayes */

static void make_naive_bayes(mb_stepper *stepper)
{
    const mb_predictor *p = stepper->predictor;
    const NaiveBayes *bayes = p->weights;
    make_past(stepper);
    CountingState *state = stepper->state;
    if (state)
        state->logits = arena_take(&stepper->arena, bayes->ahead * p->layers * p->experts, sizeof(float));
}

static void reset_naive_bayes(mb_stepper *stepper)
{
    const NaiveBayes *bayes = stepper->predictor->weights;
    reset_past(stepper->predictor, &bayes->past, stepper->state);
}

static void score_naive_bayes(mb_stepper *stepper, Size routed)
{
    const mb_predictor *p = stepper->predictor;
    const NaiveBayes *bayes = p->weights;
    const CountingState *state = stepper->state;
    for (Size layer = 0; layer < p->layers; layer++) {
        Size ahead = layer - routed;
        Size place = ahead * p->layers + layer;
        if (ahead >= 0 && ahead < bayes->ahead)
            set_scores(stepper, layer, ahead, state->logits + place * p->experts);
        else
            clear_scores(stepper, layer);
    }
}

static void start_naive_bayes(mb_stepper *stepper, int64_t token_id)
{
    const mb_predictor *p = stepper->predictor;
    const NaiveBayes *bayes = p->weights;
    const CountingState *state = stepper->state;
    int64_t row = table_row(&bayes->table, token_id);
    Size total = p->layers * p->experts;
    for (Size i = 0; i < total; i++) {
        float popular = bayes->past.popularity.logits[i], table = table_logit(&bayes->table, total, row, i);
        float past = state->past[i / p->experts].logits[i % p->experts];
        float logit = popular + bayes->token * (table - popular) + bayes->history * (past - popular);
        for (Size ahead = 0; ahead < bayes->ahead; ahead++)
            state->logits[ahead * total + i] = logit;
    }
    score_naive_bayes(stepper, 0);
}

static void route_naive_bayes(mb_stepper *stepper, Size layer, const int32_t *experts, Size count)
{
    const mb_predictor *p = stepper->predictor;
    const NaiveBayes *bayes = p->weights;
    CountingState *state = stepper->state;
    Size width = p->experts, layers = p->layers;
    add_to_past(p, &bayes->past, state, layer, experts, count);
    for (Size distance = 1; distance <= bayes->distances && layer + distance < p->layers; distance++) {
        Size target = layer + distance;
        const float *ratios = bayes->ratios + ((distance - 1) * layers + target) * width * width;
        Size first = distance >= bayes->sources ? distance - bayes->sources : 0;
        for (Size ahead = first; ahead < distance && ahead < bayes->ahead; ahead++) {
            float *logits = state->logits + (ahead * layers + target) * width;
            for (Size i = 0; i < count; i++)
                for (Size j = 0; j < width; j++)
                    logits[j] += ratios[experts[i] * width + j];
        }
    }
    score_naive_bayes(stepper, layer + 1);
}

static const Architecture NAIVE_BAYES = {make_naive_bayes, reset_naive_bayes, start_naive_bayes, route_naive_bayes};

void load_naive_bayes(Loader *loader)
{
    mb_predictor *p = loader->predictor;
    const Json *arguments = loader->arguments;
    NaiveBayes *bayes = keep(loader, 1, sizeof *bayes);
    Size experts = p->experts, layers = p->layers;
    bayes->table = read_table(loader, "table.");
    bayes->past = read_history(loader, "past.");
    bayes->ahead = integer(loader, arguments, "lookaheads", 1, MOST_DISTANCE / 2);
    bayes->sources = integer(loader, arguments, "sources", 1, MOST_DISTANCE / 2);
    bayes->distances = bayes->ahead + bayes->sources - 1;
    bayes->token = (float)number(loader, arguments, "token");
    bayes->history = (float)number(loader, arguments, "history");
    float weight = (float)number(loader, arguments, "layers");
    float smoothing = (float)number(loader, arguments, "smoothing");
    int64_t *pairs = integers(loader, 0, INT32_MAX, SHAPE(bayes->distances, layers, experts, experts), "pairs");
    bayes->ratios = keep(loader, bayes->distances * layers * experts, experts * sizeof(float));
    const Popularity *popularity = &bayes->past.popularity;
    for (Size distance = 1; distance <= bayes->distances && distance < layers; distance++)
        for (Size layer = distance; layer < layers; layer++)
            for (Size i = 0; i < experts * experts; i++) { /* i: source expert, then target expert */
                Size place = ((distance - 1) * layers + layer) * experts * experts + i;
                float popular = (float)popularity->shares[layer * experts + i % experts];
                float uses = (float)popularity->counts[(layer - distance) * experts + i / experts];
                float share = ((float)pairs[place] + smoothing * popular) / (uses + smoothing);
                bayes->ratios[place] = weight * logf(share / popular);
            }
    p->weights = bayes;
    p->architecture = &NAIVE_BAYES;
    p->lookaheads = bayes->ahead;
    p->reads_token_ids = bayes->token != 0;
}
