/* Boxes of tensors: copied, cast and summed. */
#include "kernels/ref/ref.h"

static void check_box(struct box box, const int64_t count[3]) {
    CHECK(ref_is_float(box.tensor) && box.tensor.shape[3] == 1);
    for (int dim = 0; dim < 3; dim++) {
        CHECK(box.first[dim] >= 0 && count[dim] >= 0);
        CHECK_OP(box.first[dim] + count[dim], <=, box.tensor.shape[dim]);
    }
}

/* Flat index, in its tensor, of element [i,j,k] of a box. */
static int64_t index_of(const struct box *box, int64_t i, int64_t j, int64_t k) {
    const int64_t *shape = box->tensor.shape, *first = box->first;
    return ((first[0] + i) * shape[1] + first[1] + j) * shape[2] + first[2] + k;
}

void ref_sum_boxes(const struct box *terms, int term_count, const int64_t count[3], struct box to, bool accumulate) {
    CHECK_OP(term_count, >=, 1);
    check_box(to, count);
    for (int t = 0; t < term_count; t++)
        check_box(terms[t], count);
    for (int64_t i = 0; i < count[0]; i++)
        for (int64_t j = 0; j < count[1]; j++)
            for (int64_t k = 0; k < count[2]; k++) {
                double sum = ref_load(terms[0].tensor, index_of(&terms[0], i, j, k));
                for (int t = 1; t < term_count; t++)
                    sum += ref_load(terms[t].tensor, index_of(&terms[t], i, j, k));
                if (accumulate)
                    ref_add(to.tensor, index_of(&to, i, j, k), sum);
                else
                    ref_store(to.tensor, index_of(&to, i, j, k), sum);
            }
}
