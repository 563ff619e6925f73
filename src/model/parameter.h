/* The parameter table: the only list of a model's parameters.
 *
 * Allocation, initialisation, checkpoints, the optimizer and the counts all read it. One row is one tensor in memory;
 * the experts of a block are one tensor [E, ...] whose slices have Hugging Face names of their own.
 */
#pragma once

#include "model/config.h"
#include "tensor/mesh.h"
#include "tensor/tensor.h"

enum parameter_role {
    PARAMETER_EMBEDDING,      /* [V,D] */
    PARAMETER_ATTENTION_NORM, /* [D] */
    PARAMETER_QUERY,          /* [H*P, D] */
    PARAMETER_KEY,            /* [G*P, D] */
    PARAMETER_VALUE,          /* [G*P, D] */
    PARAMETER_QUERY_NORM,     /* [P] */
    PARAMETER_KEY_NORM,       /* [P] */
    PARAMETER_OUTPUT,         /* [D, H*P] */
    PARAMETER_MLP_NORM,       /* [D] */
    PARAMETER_ROUTER,         /* [E,D] */
    PARAMETER_GATE,           /* [E,F,D], or [I,D] in a dense model */
    PARAMETER_UP,             /* as PARAMETER_GATE */
    PARAMETER_DOWN,           /* [E,D,F], or [D,I] */
    PARAMETER_FINAL_NORM,     /* [D] */
    PARAMETER_HEAD,           /* [V,D]; absent when tied to the embedding */
    PARAMETER_ROLE_COUNT,
};

enum { PARAMETER_NAME_BYTES = 96 };

struct parameter {
    enum parameter_role role;
    int block;                       /* -1 for those outside the blocks */
    char name[PARAMETER_NAME_BYTES]; /* Hugging Face's; "{e}" stands for the expert's number */
    int dim_count;
    int64_t shape[3];
    bool is_expert;   /* dimension 0 counts experts */
    bool is_matrix;   /* multiplied with: weight decay */
    bool is_packed;   /* read by a product of the kernels, packed for it */
    double init_deviation; /* fresh weights: normal with this deviation; 0: all ones */
    struct layout layout;
};

struct parameter_table {
    struct parameter *rows;
    int count;
    int block_count;
};

/* Build the table of a checked configuration. Release with parameter_table_release. */
enum status parameter_table_init(struct parameter_table *table, const struct model_config *config) MUST_USE;
void parameter_table_release(struct parameter_table *table);

/* Parameters move between ranks in groups, for each is needed at another time: those of a block (0 and up), the embedding,
 * and the end of the model, which is the final norm and the head (where tied to the embedding, the norm alone). */
enum { GROUP_EMBEDDING = -1, GROUP_HEAD = -2, GROUP_FIRST = GROUP_HEAD };
int parameter_group(const struct parameter *parameter);

/* Row of a role in a block (-1 outside the blocks); -1 where the model has none. */
int parameter_find(const struct parameter_table *table, enum parameter_role role, int block);

int64_t parameter_elements(const struct parameter *parameter);

/* A row over memory: the tensor with the row's shape. */
struct tensor parameter_tensor(const struct parameter *parameter, void *data, enum dtype dtype);

/* Tensors of a row as a file names them: 1, or E for experts. */
int64_t parameter_file_tensors(const struct parameter *parameter);

/* Name of file tensor `index` into `name`. */
void parameter_file_name(const struct parameter *parameter, int64_t index, char name[PARAMETER_NAME_BYTES]);

struct parameter_counts {
    int64_t total;
    int64_t active; /* those that one token meets: K of E experts, everything else */
    int64_t embedding; /* of the total: embedding and head */
};
struct parameter_counts parameter_table_count(const struct parameter_table *table, const struct model_config *config);
