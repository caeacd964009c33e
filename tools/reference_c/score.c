/* Step a predictor through recorded tokens, as an engine would while it decodes.
 *
 *     score FOLDER [--scores FILE | --time] < TOKENS
 *
 * A line of TOKENS is a token id and its L * K experts, layer by layer; -1 stands for no expert. An empty line starts a
 * new sequence. Prints for every token the experts that each layer was expected to select, just before it was routed.
 * --scores writes the scores after every call instead, float32 (tokens, 1 + L, L, E). --time prints microseconds.
 */
#define _POSIX_C_SOURCE 199309L
#include "moe_beyond.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static int problem(const char *what)
{
    fprintf(stderr, "score: %s\n", what);
    return 2;
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e6 + (double)time.tv_nsec / 1e3;
}

/* The best `count` experts, unordered. */
static void best(const float *scores, int experts, int count, int32_t *chosen)
{
    int size = 0;
    for (int expert = 0; expert < experts; expert++) {
        if (size < count) {
            chosen[size++] = expert;
            continue;
        }
        int worst = 0;
        for (int i = 1; i < count; i++)
            worst = scores[chosen[i]] < scores[chosen[worst]] ? i : worst;
        if (scores[expert] > scores[chosen[worst]])
            chosen[worst] = expert;
    }
}

/* Read a token and its experts; 0 at the end, -1 for an empty line, -2 for a line that is not one. */
static int read_token(int64_t *numbers, size_t count)
{
    size_t read = 0;
    for (;;) {
        int c = getchar();
        while (c == ' ' || c == '\t' || c == '\r')
            c = getchar();
        if (c == '\n' || c == EOF)
            return read == count ? 1 : read ? -2 : c == EOF ? 0 : -1;
        char digits[24];
        size_t length = 0;
        for (; c != EOF && strchr("-0123456789", c) && length < sizeof digits - 1; c = getchar())
            digits[length++] = (char)c;
        digits[length] = '\0';
        ungetc(c, stdin);
        char *end;
        errno = 0;
        long long value = strtoll(digits, &end, 10);
        if (!length || *end || errno || read == count)
            return -2;
        numbers[read++] = value;
    }
}

typedef struct { double *values; size_t count, room; } Times;

static int add_time(Times *times, double value)
{
    if (times->count == times->room) {
        size_t room = times->room ? 2 * times->room : 1024;
        double *values = realloc(times->values, room * sizeof *values);
        if (!values)
            return 0;
        times->values = values, times->room = room;
    }
    times->values[times->count++] = value;
    return 1;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print_times(const char *name, Times *times)
{
    qsort(times->values, times->count, sizeof *times->values, compare);
    if (times->count)
        printf("%s %.2f %.2f\n", name, times->values[times->count / 2], times->values[times->count * 99 / 100]);
    free(times->values);
}

static int step_all(mb_predictor *predictor, mb_stepper *stepper, int64_t *numbers, int32_t *experts, FILE *file,
                    int timed)
{
    int layers = mb_layers(predictor), total = mb_experts(predictor), top_k = mb_top_k(predictor), read;
    size_t count = (size_t)layers * (size_t)top_k, all = (size_t)layers * (size_t)total;
    int32_t *expected = experts + top_k;
    Times starts = {0}, steps = {0}, tokens = {0};
    while ((read = read_token(numbers, 1 + count))) {
        if (read == -2)
            return problem("a line is not a token id and its experts");
        if (read == -1) {
            mb_reset(stepper);
            continue;
        }
        double began = now(), before = began;
        if (mb_observe_token(stepper, numbers[0]))
            return problem("a token id is not in the vocabulary");
        for (int layer = 0; layer < layers; layer++) {
            const float *scores = mb_scores(stepper) + (size_t)layer * (size_t)total;
            best(scores, total, top_k, expected);
            if (timed) {
                double end = now();
                if (!add_time(layer ? &steps : &starts, end - before))
                    return problem("not enough memory");
            }
            if (file && fwrite(mb_scores(stepper), sizeof(float), all, file) != all)
                return problem("the scores cannot be written");
            if (!file && !timed) {
                printf("%lld %d:", (long long)numbers[0], layer);
                for (int i = 0; i < top_k && !isnan(scores[0]); i++)
                    printf(" %d", (int)expected[i]);
                printf("\n");
            }
            int chosen = 0;
            for (int i = 0; i < top_k; i++) {
                int64_t expert = numbers[1 + layer * top_k + i];
                if (expert < -1 || expert >= total)
                    return problem("an expert id is out of range");
                if (expert >= 0)
                    experts[chosen++] = (int32_t)expert;
            }
            before = now();
            if (mb_observe_layer(stepper, layer, experts, chosen))
                return problem("an expert is repeated");
        }
        if (timed && !(add_time(&steps, now() - before) && add_time(&tokens, (now() - began) / layers)))
            return problem("not enough memory");
        if (file && fwrite(mb_scores(stepper), sizeof(float), all, file) != all)
            return problem("the scores cannot be written");
    }
    if (timed) {
        print_times("start", &starts);
        print_times("layer", &steps);
        print_times("whole", &tokens);
    }
    return 0;
}

int main(int argc, char **argv)
{
    int timed = argc == 3 && !strcmp(argv[2], "--time"), writes = argc == 4 && !strcmp(argv[2], "--scores");
    if (argc != 2 && !timed && !writes)
        return problem("usage: score FOLDER [--scores FILE | --time] < TOKENS");
    char error[512];
    mb_predictor *predictor = mb_load(argv[1], error, sizeof error);
    if (!predictor)
        return problem(*error ? error : "not enough memory");
    size_t top_k = (size_t)mb_top_k(predictor);
    mb_stepper *stepper = mb_stepper_new(predictor);
    int64_t *numbers = calloc(1 + (size_t)mb_layers(predictor) * top_k, sizeof *numbers);
    int32_t *experts = calloc(2 * top_k, sizeof *experts);
    FILE *file = writes ? fopen(argv[3], "wb") : NULL;
    int code;
    if (!stepper || !numbers || !experts)
        code = problem("not enough memory");
    else if (writes && !file)
        code = problem("the file for the scores cannot be opened");
    else
        code = step_all(predictor, stepper, numbers, experts, file, timed);
    if (file && fclose(file) && !code)
        code = problem("the scores cannot be written");
    free(numbers);
    free(experts);
    mb_stepper_free(stepper);
    mb_free(predictor);
    return code;
}
