#include "parallel/pass.h"

static enum status gather_start(const struct model *model, struct traffic *traffic, int block) {
    if (!traffic || model->sharding.zero < 3 || block >= model->table.block_count)
        return STATUS_OK;
    return traffic_gather_start(traffic, block);
}

static enum status gather_finish(const struct model *model, struct traffic *traffic, int block) {
    return traffic && model->sharding.zero == 3 ? traffic_gather_finish(traffic, block) : STATUS_OK;
}

enum status pass_forward(const struct model *model, struct workspace *w, struct traffic *traffic) {
    TRY(gather_start(model, traffic, GROUP_EMBEDDING));
    TRY(gather_start(model, traffic, 0));
    TRY(gather_finish(model, traffic, GROUP_EMBEDDING));
    TRY(gather_start(model, traffic, GROUP_HEAD));
    model_embed_forward(model, w);
    for (int block = 0; block < w->block_count; block++) {
        TRY(gather_finish(model, traffic, block));
        TRY(gather_start(model, traffic, block + 1)); /* into the slot of the block before, which has computed */
        TRY(block_forward(model, w, block, NULL, true));
    }
    TRY(gather_finish(model, traffic, GROUP_HEAD));
    model_head(model, w, 1, false);
    return STATUS_OK;
}
