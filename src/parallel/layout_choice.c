#include "parallel/layout_choice.h"

#include "base/text.h"
#include <math.h>
#include <stdio.h>

enum { ROW_FACTOR = 4, MACHINE_FACTOR = 8, OPERATIONS_PER_BYTE = 20, STATE_BYTES = 4, SHOWN_MAX = 4 };

static const double STATE_SHARE = 0.5; /* of a rank's memory */
static const double WAIT_SHARE = 0.25; /* of the experts' computing */

void layout_facts_of_model(struct layout_facts *facts, const struct parameter_table *table,
                           const struct model_config *config, enum dtype compute) {
    facts->dense_elements = facts->expert_elements = 0;
    for (int i = 0; i < table->count; i++) {
        const struct parameter *row = &table->rows[i];
        *(row->is_expert ? &facts->expert_elements : &facts->dense_elements) += parameter_elements(row);
    }
    facts->experts = config->num_experts;
    facts->weight_bytes = (int)dtype_size(compute);
    facts->token_row_bytes = 0;
    facts->token_expert_operations = 0;
    if (config->num_experts == 0)
        return;
    int64_t rows = config->num_experts_per_tok * config->num_hidden_layers;
    facts->token_row_bytes = rows * config->hidden_size * facts->weight_bytes;
    facts->token_expert_operations =
        3 * model_forward_operations(config, 1).experts * (double)config->num_hidden_layers;
}

/* ---- what a layout costs ----------------------------------------------------------------------------------------- */

double layout_state_bytes(const struct sharding *sharding, const struct layout_facts *facts) {
    const int *size = sharding->mesh.size;
    double dense = (double)facts->dense_elements, experts = (double)facts->expert_elements;
    double compute = dense + experts / size[MESH_EXPERT];
    double own = (dense + experts) / (size[MESH_SHARD] * size[MESH_EXPERT]);
    double weights = sharding->zero >= 3 ? own : compute, gradients = sharding->zero >= 2 ? own : compute;
    double moments = sharding->zero >= 1 ? own : compute;
    return STATE_BYTES * (weights + gradients + 2 * moments);
}

/* What bytes count that are exchanged by `size` ranks that lie `stride` apart. */
static double link_factor(const struct layout_facts *facts, int size, int stride) {
    int machine = facts->ranks_per_machine > 0 ? facts->ranks_per_machine : facts->ranks;
    return machine % (size * stride) == 0 ? 1 : MACHINE_FACTOR;
}

/* A share of what all have comes from others. */
static double from_others(int size) {
    return (double)(size - 1) / size;
}

/* Bytes that reach a rank in a step, weighted by what they hold up. */
static double traffic_cost(const struct sharding *sharding, const struct layout_facts *facts) {
    const int *size = sharding->mesh.size;
    int replicate = size[MESH_REPLICATE], shard = size[MESH_SHARD], expert = size[MESH_EXPERT], parts = shard * expert;
    double micro = (double)(facts->micro_batch_count > 0 ? facts->micro_batch_count : 1);
    double w = facts->weight_bytes, g = facts->gradient_bytes;
    double gathers = sharding->zero == 3 ? 2 * micro : 1, reduces = sharding->zero >= 2 ? micro : 1;
    double divided = gathers * w + reduces * g; /* a byte count for each element that this rank does not own */
    if (sharding->zero == 0)
        divided = 2 * g;
    double dense = (double)facts->dense_elements, experts = (double)facts->expert_elements;
    double cost = divided * dense * from_others(parts) * link_factor(facts, parts, 1);
    cost += divided * experts / expert * from_others(shard) * link_factor(facts, shard, expert);
    double own = sharding->zero == 0 ? dense + experts / expert : (dense + experts) / parts;
    cost += 2 * g * own * from_others(replicate) * link_factor(facts, replicate, parts);
    double tokens = (double)facts->tokens / facts->ranks, rows = 4.0 * (double)facts->token_row_bytes * tokens;
    cost += ROW_FACTOR * rows * from_others(expert) * link_factor(facts, expert, 1);
    return cost + WAIT_SHARE * facts->token_expert_operations * tokens / OPERATIONS_PER_BYTE * from_others(expert);
}

/* ---- which layouts there are ------------------------------------------------------------------------------------- */

struct candidate {
    int replicate, shard, expert;
};

/* The next mesh of all ranks after *c, in order of expert, then shard; false after the last. Begin with zeros. */
static bool next_candidate(struct candidate *c, int ranks) {
    if (c->expert == 0)
        *c = (struct candidate){0, 0, 1};
    for (; c->expert <= ranks; c->expert++, c->shard = 0) {
        if (ranks % c->expert != 0)
            continue;
        for (c->shard++; c->shard <= ranks / c->expert; c->shard++)
            if (ranks / c->expert % c->shard == 0) {
                c->replicate = ranks / (c->expert * c->shard);
                return true;
            }
    }
    return false;
}

static bool has_experts_for(const struct layout_facts *facts, int expert) {
    return expert == 1 || expert <= facts->experts;
}

static bool is_wished(const struct layout_wishes *wishes, const struct candidate *c) {
    return (wishes->replicate == 0 || wishes->replicate == c->replicate) &&
           (wishes->shard == 0 || wishes->shard == c->shard) && (wishes->expert == 0 || wishes->expert == c->expert);
}

/* Who asks for a stage that divides, and for no axis, asks to divide over all ranks. */
static bool divides_as_asked(const struct layout_wishes *wishes, const struct candidate *c) {
    return wishes->zero <= 0 || wishes->replicate > 0 || wishes->shard > 0 || c->replicate == 1;
}

static struct sharding sharding_of(const struct candidate *c, int zero, int rank) {
    const int size[MESH_AXIS_COUNT] = {1, c->replicate, c->shard, c->expert};
    return (struct sharding){mesh_make(size, rank), zero};
}

/* What is compared: fitting beats not fitting; then the cost, and where nothing fits or costs are the same, the state.
 */
struct rating {
    bool fits;
    double cost, state;
};

static struct rating rate(const struct sharding *sharding, const struct layout_facts *facts) {
    struct rating rating = {true, traffic_cost(sharding, facts), layout_state_bytes(sharding, facts)};
    if (facts->rank_memory_bytes > 0 && rating.state > STATE_SHARE * (double)facts->rank_memory_bytes)
        rating.fits = false;
    return rating;
}

static bool is_better(struct rating a, struct rating b) {
    if (a.fits != b.fits)
        return a.fits;
    if (a.fits && fabs(a.cost - b.cost) > 1e-9 * (a.cost + b.cost))
        return a.cost < b.cost;
    return a.state < b.state;
}

/* The best of all that is wished; `even`: of those whose expert axis divides the experts. False: there is none. */
static bool choose_best(const struct layout_wishes *wishes, const struct layout_facts *facts, bool even, int rank,
                        struct sharding *out) {
    struct candidate c = {0, 0, 0};
    struct rating best = {false, 0, 0};
    bool found = false;
    while (next_candidate(&c, facts->ranks)) {
        bool divides = c.expert == 1 || facts->experts % c.expert == 0;
        if (!is_wished(wishes, &c) || !divides_as_asked(wishes, &c) || !has_experts_for(facts, c.expert) ||
            (even && !divides))
            continue;
        for (int zero = 3; zero >= 0; zero--) {
            if (wishes->zero != LAYOUT_ZERO_CHOOSE && zero != wishes->zero)
                continue;
            struct sharding sharding = sharding_of(&c, zero, rank);
            struct rating rating = rate(&sharding, facts);
            if (found && !is_better(rating, best))
                continue;
            found = true;
            best = rating;
            *out = sharding;
        }
    }
    return found;
}

/* ---- what does not fit ------------------------------------------------------------------------------------------- */

/* From a wish in factors; what was not wished should be small, shard before expert before replicate. */
static double distance_one(int64_t wish, int have, double unwished) {
    return wish > 0 ? fabs(log((double)wish / have)) : unwished * log(have);
}

static double distance(const struct layout_wishes *wishes, const struct candidate *c) {
    return distance_one(wishes->replicate, c->replicate, 0.03) + distance_one(wishes->shard, c->shard, 0.01) +
           distance_one(wishes->expert, c->expert, 0.02);
}

static void add_candidate(struct text *text, const struct candidate *c, bool first) {
    const int size[3] = {c->replicate, c->shard, c->expert};
    static const char *const keys[3] = {"replicate", "shard", "expert"};
    const char *between = first ? "" : ", ";
    for (int i = 0; i < 3; i++)
        if (size[i] > 1 || (i == 1 && c->replicate * c->expert == 1)) {
            text_printf(text, "%s--layout.%s %d", between, keys[i], size[i]);
            between = " ";
        }
}

/* The possible meshes that are nearest to the wishes. */
static void add_nearest(struct text *text, const struct layout_wishes *wishes, const struct layout_facts *facts) {
    struct candidate nearest[SHOWN_MAX];
    int count = 0;
    struct candidate c = {0, 0, 0};
    while (next_candidate(&c, facts->ranks)) {
        if (!has_experts_for(facts, c.expert))
            continue;
        int place = count < SHOWN_MAX ? count++ : SHOWN_MAX;
        while (place > 0 && distance(wishes, &c) < distance(wishes, &nearest[place - 1]) - 1e-9) {
            if (place < SHOWN_MAX)
                nearest[place] = nearest[place - 1];
            place--;
        }
        if (place < SHOWN_MAX)
            nearest[place] = c;
    }
    for (int i = 0; i < count; i++)
        add_candidate(text, &nearest[i], i == 0);
}

/* "layout.shard 3 x layout.expert 2"; returns the product, and how many keys were given. */
static int64_t add_wishes(struct text *text, const struct layout_wishes *wishes, int *given) {
    const int64_t wished[3] = {wishes->replicate, wishes->shard, wishes->expert};
    static const char *const keys[3] = {"replicate", "shard", "expert"};
    int64_t product = 1;
    *given = 0;
    for (int i = 0; i < 3; i++)
        if (wished[i] > 0) {
            text_printf(text, "%slayout.%s %lld", *given ? " x " : "", keys[i], (long long)wished[i]);
            product *= wished[i];
            ++*given;
        }
    return product;
}

static enum status fail_wishes(const struct layout_wishes *wishes, const struct layout_facts *facts) {
    struct text text = {0};
    int given;
    if (wishes->expert > 1 && wishes->expert > facts->experts) {
        text_printf(&text, "layout.expert %lld, but the model has ", (long long)wishes->expert);
        text_printf(&text, facts->experts > 0 ? "%lld experts" : "no experts", (long long)facts->experts);
    } else {
        int64_t product = add_wishes(&text, wishes, &given);
        if (given > 1)
            text_printf(&text, " = %lld ranks, but %d %s started", (long long)product, facts->ranks,
                        facts->ranks == 1 ? "was" : "were");
        else
            text_printf(&text, " does not divide the %d rank%s started", facts->ranks, facts->ranks == 1 ? "" : "s");
    }
    text_add_string(&text, "; possible: ");
    add_nearest(&text, wishes, facts);
    enum status status = status_fail(STATUS_USAGE, "%s", text_string(&text));
    text_release(&text);
    return status;
}

enum status layout_choose(const struct layout_wishes *wishes, const struct layout_facts *facts, int rank,
                          struct sharding *out) {
    CHECK(facts->ranks >= 1 && rank >= 0 && rank < facts->ranks);
    CHECK(wishes->replicate >= 0 && wishes->shard >= 0 && wishes->expert >= 0);
    CHECK(wishes->zero >= LAYOUT_ZERO_CHOOSE && wishes->zero <= 3);
    if (facts->batch_sequences > 0 && facts->batch_sequences < facts->ranks)
        return status_fail(
            STATUS_USAGE,
            "train.batch_sequences %lld leaves some of %d ranks without work; raise it to %d, or start %lld",
            (long long)facts->batch_sequences, facts->ranks, facts->ranks, (long long)facts->batch_sequences);
    if (!choose_best(wishes, facts, true, rank, out) && !choose_best(wishes, facts, false, rank, out))
        return fail_wishes(wishes, facts);
    return STATUS_OK;
}

char *layout_describe(const struct sharding *sharding, char line[LAYOUT_LINE_BYTES]) {
    const int *size = sharding->mesh.size;
    int ranks = mesh_rank_count(&sharding->mesh);
    int islands = size[MESH_ISLAND], used = 0;
    if (islands > 1)
        used = snprintf(line, LAYOUT_LINE_BYTES, "%d islands of ", islands);
    if (ranks == islands)
        snprintf(line + used, LAYOUT_LINE_BYTES - (size_t)used, "1 rank");
    else
        snprintf(line + used, LAYOUT_LINE_BYTES - (size_t)used,
                 "%d ranks: replicate %d x shard %d x expert %d, ZeRO %d", ranks / islands, size[MESH_REPLICATE],
                 size[MESH_SHARD], size[MESH_EXPERT], sharding->zero);
    return line;
}
