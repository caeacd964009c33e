/* Scores of moe_beyond's predictors, for engines that do not run Python. README.md describes the files and formulas.
 *
 * Call order for a token: mb_observe_token, then mb_observe_layer for the layers 0 .. L-1; mb_scores at any time.
 * A predictor is not changed after mb_load, so threads may share it. A stepper belongs to one sequence.
 */
#ifndef MOE_BEYOND_H
#define MOE_BEYOND_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mb_predictor mb_predictor;
typedef struct mb_stepper mb_stepper;

enum { MB_OK = 0, MB_OUT_OF_ORDER = 1, MB_OUT_OF_RANGE = 2 };

/* Read a predictor folder: config.json and model.safetensors.
 *
 * Returns NULL if a file is missing, damaged or not supported; `error` then holds one line of at most `size` bytes.
 */
mb_predictor *mb_load(const char *folder, char *error, size_t size);
void mb_free(mb_predictor *predictor);

int mb_layers(const mb_predictor *predictor);  /* MoE layers, L */
int mb_experts(const mb_predictor *predictor); /* experts per layer, E */
int mb_top_k(const mb_predictor *predictor);   /* experts per token and layer, K */

/* Create a stepper at the start of a sequence; NULL without memory. Free it before its predictor. */
mb_stepper *mb_stepper_new(const mb_predictor *predictor);
void mb_stepper_free(mb_stepper *stepper);
void mb_reset(mb_stepper *stepper); /* return to the start of a sequence */

/* Start a token. MB_OUT_OF_ORDER: layers of the token before are missing. MB_OUT_OF_RANGE: the id is not in the
 * vocabulary. After an error the stepper is unchanged.
 */
int mb_observe_token(mb_stepper *stepper, int64_t token_id);

/* Observe the `count` <= K different experts that `layer` selected, in any order. Layers count from 0, MoE layers only.
 * MB_OUT_OF_ORDER: the layer is not the next one. MB_OUT_OF_RANGE: an expert is repeated, an expert is not in 0 .. E-1,
 * or there are more than K. After an error the stepper is unchanged.
 */
int mb_observe_layer(mb_stepper *stepper, int layer, const int32_t *experts, int count);

/* Probabilities (L, E) that the next run of each layer uses each expert; NaN where no score is available yet. The next
 * run of a layer that is routed belongs to the next token. The array is valid until the next call with this stepper.
 */
const float *mb_scores(const mb_stepper *stepper);

#ifdef __cplusplus
}
#endif

#endif
