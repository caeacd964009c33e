/* The public functions: call order, ranges, and the way from logits to probabilities. */
#include "internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_LAYERS = 10000, MOST_EXPERTS = 32767, MOST_SIZE = 1 << 24 };

static void load_token_causal(Loader *loader)
{
    load_neural(loader, 0);
}

static void load_cross_layer(Loader *loader)
{
    load_neural(loader, 1);
}

static const struct { const char *name; void (*load)(Loader *); } LOADERS[] = {
    {"cross_layer", load_cross_layer}, {"token_causal", load_token_causal}, {"naive_bayes", load_naive_bayes},
    {"token_table", load_token_table}, {"history", load_history},           {"popularity", load_popularity},
};

static void load_calibration(Loader *loader, const Json *calibration, const char *name, float *values)
{
    const Json *rows = member(calibration, name);
    int64_t left = loader->predictor->lookaheads;
    for (const Json *row = rows && rows->kind == JSON_LIST ? rows->child : NULL; row; row = row->next) {
        Size layers = 0;
        for (const Json *value = row->kind == JSON_LIST ? row->child : NULL; value; value = value->next) {
            if (left <= 0 || layers == loader->predictor->layers || value->kind != JSON_NUMBER)
                fail(loader, "config.json: calibration has another shape than (lookaheads, layers)");
            *values++ = (float)value->number;
            if (!isfinite(values[-1]))
                fail(loader, "config.json: calibration is not finite");
            layers++;
        }
        if (layers != loader->predictor->layers)
            fail(loader, "config.json: calibration has another shape than (lookaheads, layers)");
        left--;
    }
    if (left)
        fail(loader, "config.json: calibration has another shape than (lookaheads, layers)");
}

static void load(Loader *loader)
{
    open_folder(loader);
    mb_predictor *predictor = loader->predictor;
    const Json *geometry = member(loader->config, "geometry");
    const Json *layers = member(geometry, "moe_layers");
    for (const Json *each = layers && layers->kind == JSON_LIST ? layers->child : NULL; each; each = each->next)
        if (++predictor->layers > MOST_LAYERS)
            fail(loader, "config.json has too many layers");
    if (!predictor->layers)
        fail(loader, "config.json has no layers");
    predictor->experts = integer(loader, geometry, "num_experts", 1, MOST_EXPERTS);
    predictor->top_k = integer(loader, geometry, "top_k", 1, predictor->experts);
    predictor->vocab_size = integer(loader, loader->config, "vocab_size", 1, MOST_SIZE);
    predictor->reads_token_ids = 1;
    const Json *activation = member(loader->config, "activation"), *name = member(loader->config, "architecture");
    if (!activation || activation->kind != JSON_STRING || !name || name->kind != JSON_STRING)
        fail(loader, "config.json has no architecture or activation");
    const char *activations[] = {"sigmoid", "softmax", "subset"};
    while ((int)predictor->activation < 3 && strcmp(activation->text, activations[predictor->activation]))
        predictor->activation++;
    if ((int)predictor->activation == 3)
        fail(loader, "config.json has the unknown activation %s", activation->text);
    Size i = 0, count = sizeof LOADERS / sizeof *LOADERS;
    while (i < count && strcmp(name->text, LOADERS[i].name))
        i++;
    if (i == count)
        fail(loader, "the architecture %s is not supported", name->text);
    LOADERS[i].load(loader);
    Size numbers = predictor->lookaheads * predictor->layers;
    predictor->scale = keep(loader, numbers, sizeof(float));
    predictor->shift = keep(loader, numbers, sizeof(float));
    for (Size j = 0; j < numbers; j++)
        predictor->scale[j] = 1;
    const Json *calibration = member(loader->config, "calibration");
    if (calibration && calibration->kind != JSON_NULL) {
        load_calibration(loader, calibration, "scale", predictor->scale);
        load_calibration(loader, calibration, "shift", predictor->shift);
    }
}

/* setjmp is called by a function without variables of its own, whose values would be lost. */
static int load_or_return(Loader *loader)
{
    if (setjmp(loader->jump))
        return 0;
    load(loader);
    return 1;
}

mb_predictor *mb_load(const char *folder, char *error, size_t size)
{
    mb_predictor *predictor = calloc(1, sizeof *predictor);
    Loader loader = {.predictor = predictor, .folder = folder, .error = error, .error_size = size};
    int loaded = predictor && load_or_return(&loader);
    arena_free(&loader.scratch);
    if (loaded)
        return predictor;
    if (!predictor && size)
        *error = '\0';
    mb_free(predictor);
    return NULL;
}

void mb_free(mb_predictor *predictor)
{
    if (predictor)
        arena_free(&predictor->arena);
    free(predictor);
}

int mb_layers(const mb_predictor *predictor)
{
    return (int)predictor->layers;
}

int mb_experts(const mb_predictor *predictor)
{
    return (int)predictor->experts;
}

int mb_top_k(const mb_predictor *predictor)
{
    return (int)predictor->top_k;
}

mb_stepper *mb_stepper_new(const mb_predictor *predictor)
{
    mb_stepper *stepper = calloc(1, sizeof *stepper);
    if (!stepper)
        return NULL;
    Size experts = predictor->experts, total = experts * predictor->layers;
    stepper->predictor = predictor;
    stepper->scores = arena_take(&stepper->arena, total, sizeof *stepper->scores);
    stepper->logits = arena_take(&stepper->arena, total, sizeof *stepper->logits);
    stepper->powers = arena_take(&stepper->arena, experts, sizeof *stepper->powers);
    stepper->seen = arena_take(&stepper->arena, experts, sizeof *stepper->seen);
    predictor->architecture->make_state(stepper);
    if (stepper->arena.failed) {
        mb_stepper_free(stepper);
        return NULL;
    }
    mb_reset(stepper);
    return stepper;
}

void mb_stepper_free(mb_stepper *stepper)
{
    if (stepper)
        arena_free(&stepper->arena);
    free(stepper);
}

void mb_reset(mb_stepper *stepper)
{
    stepper->next_layer = stepper->predictor->layers;
    for (Size layer = 0; layer < stepper->predictor->layers; layer++)
        clear_scores(stepper, layer);
    stepper->predictor->architecture->reset(stepper);
}

int mb_observe_token(mb_stepper *stepper, int64_t token_id)
{
    const mb_predictor *predictor = stepper->predictor;
    if (stepper->next_layer != predictor->layers)
        return MB_OUT_OF_ORDER;
    if (predictor->reads_token_ids && (token_id < 0 || token_id >= predictor->vocab_size))
        return MB_OUT_OF_RANGE;
    predictor->architecture->start_token(stepper, token_id);
    stepper->next_layer = 0;
    return MB_OK;
}

int mb_observe_layer(mb_stepper *stepper, int layer, const int32_t *experts, int count)
{
    const mb_predictor *predictor = stepper->predictor;
    if (layer != stepper->next_layer || layer >= predictor->layers)
        return MB_OUT_OF_ORDER;
    if (count < 0 || count > predictor->top_k)
        return MB_OUT_OF_RANGE;
    stepper->calls++;
    for (Size i = 0; i < count; i++) {
        if (experts[i] < 0 || experts[i] >= predictor->experts || stepper->seen[experts[i]] == stepper->calls)
            return MB_OUT_OF_RANGE;
        stepper->seen[experts[i]] = stepper->calls;
    }
    clear_scores(stepper, layer);
    predictor->architecture->route(stepper, layer, experts, count);
    stepper->next_layer++;
    return MB_OK;
}

const float *mb_scores(const mb_stepper *stepper)
{
    return stepper->scores;
}

Size find_id(const int64_t *sorted, Size count, int64_t id)
{
    Size low = 0, high = count;
    while (low < high) {
        Size middle = low + (high - low) / 2;
        if (sorted[middle] < id)
            low = middle + 1;
        else
            high = middle;
    }
    return low < count && sorted[low] == id ? low : -1;
}

void clear_scores(mb_stepper *stepper, Size layer)
{
    Size experts = stepper->predictor->experts;
    for (Size i = 0; i < experts; i++)
        stepper->scores[layer * experts + i] = NAN;
}

/* Return the shift s for which the sum of sigmoid(x - s) is top_k, by Newton's method on the logarithm of the sum. */
static double subset_shift(const float *x, Size experts, Size top_k, double lowest, double highest, double *powers)
{
    double wanted = (double)top_k;
    if (top_k == experts)
        return lowest - 20; /* all are selected */
    double odds = log(wanted / ((double)experts - wanted)), low = lowest - odds, high = highest - odds, total = 0;
    for (Size i = 0; i < experts; i++)
        total += powers[i] = exp(x[i] - highest);
    double shift = fmin(highest + log(total) - log(wanted), high);
    for (Size step = 0; step < 60; step++) {
        double slope = 0, power = exp(shift - highest);
        total = 0;
        for (Size i = 0; i < experts; i++) {
            double probability = powers[i] / (powers[i] + power + 1e-300); /* never 0 / 0 */
            total += probability;
            slope += probability * (1 - probability);
        }
        if (total > wanted)
            low = shift;
        else
            high = shift;
        double proposal = shift + log(total / wanted) / fmax(slope / total, 1e-12);
        if (!(proposal >= low && proposal <= high))
            proposal = (low + high) / 2;
        double size = fabs(proposal - shift);
        shift = proposal;
        if (size < 1e-4)
            break;
    }
    return shift;
}

void set_scores(mb_stepper *stepper, Size layer, Size lookahead, const float *logits)
{
    const mb_predictor *predictor = stepper->predictor;
    Size experts = predictor->experts;
    Size place = lookahead * predictor->layers + layer;
    float scale = predictor->scale[place], shift = predictor->shift[place];
    float *x = stepper->scores + layer * experts, lowest = INFINITY, highest = -INFINITY;
    for (Size i = 0; i < experts; i++) {
        x[i] = logits[i] * scale + shift;
        lowest = fminf(lowest, x[i]);
        highest = fmaxf(highest, x[i]);
    }
    if (predictor->activation == SOFTMAX) {
        double total = 0;
        for (Size i = 0; i < experts; i++)
            total += stepper->powers[i] = exp((double)x[i] - highest);
        for (Size i = 0; i < experts; i++)
            x[i] = (float)fmin((double)predictor->top_k * stepper->powers[i] / total, 1);
        return;
    }
    double middle = 0;
    if (predictor->activation == SUBSET)
        middle = subset_shift(x, experts, predictor->top_k, lowest, highest, stepper->powers);
    for (Size i = 0; i < experts; i++)
        x[i] = 1 / (1 + expf((float)(middle - x[i])));
}
