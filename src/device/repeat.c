#include "device/device.h"

void device_forget(const struct device_recorder *recorder, struct repeated *work) {
    recorder->release(work->recording);
    work->recording = NULL;
}

enum status device_repeat(const struct device_recorder *recorder, struct repeated *work, enum status (*ask)(void *context),
                          void *context) {
    if (work->recording && recorder->repeat(work->recording))
        return STATUS_OK;
    device_forget(recorder, work);
    if (!work->is_warm || work->is_refused) {
        work->is_warm = true;
        return ask(context);
    }
    recorder->begin();
    enum status status = ask(context);
    work->recording = recorder->end();
    if (status == STATUS_OK && work->recording && recorder->repeat(work->recording))
        return STATUS_OK;
    device_forget(recorder, work);
    if (status != STATUS_OK)
        return status;
    work->is_refused = true;
    return ask(context);
}
