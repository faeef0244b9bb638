#define _GNU_SOURCE
#include "ring.h"

#include <errno.h>
#include <linux/io_uring.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static int enter(ring *r, unsigned submit, unsigned complete) {
    unsigned flags = complete ? IORING_ENTER_GETEVENTS : 0;
    return (int)syscall(__NR_io_uring_enter, r->fd, submit, complete, flags, NULL, 0);
}

int ring_open(ring *r, unsigned depth) {
    struct io_uring_params params;
    memset(&params, 0, sizeof params);
    memset(r, 0, sizeof *r);
    r->memory = r->entries = MAP_FAILED;
    r->fd = (int)syscall(__NR_io_uring_setup, depth, &params);
    if (r->fd < 0)
        return errno;
    if (!(params.features & IORING_FEAT_SINGLE_MMAP)) {
        ring_close(r);
        return ENOSYS; /* before Linux 5.4 */
    }
    size_t submit = params.sq_off.array + params.sq_entries * sizeof(unsigned);
    size_t complete = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
    r->memory_length = submit > complete ? submit : complete;
    r->memory = mmap(NULL, r->memory_length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
                     r->fd, IORING_OFF_SQ_RING);
    r->entries_length = params.sq_entries * sizeof(struct io_uring_sqe);
    r->entries = mmap(NULL, r->entries_length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
                      r->fd, IORING_OFF_SQES);
    if (r->memory == MAP_FAILED || r->entries == MAP_FAILED) {
        int error = errno;
        ring_close(r);
        return error;
    }
    char *base = r->memory;
    r->depth = depth;
    r->submit_tail = (unsigned *)(base + params.sq_off.tail);
    r->submit_mask = (unsigned *)(base + params.sq_off.ring_mask);
    r->submit_array = (unsigned *)(base + params.sq_off.array);
    r->complete_head = (unsigned *)(base + params.cq_off.head);
    r->complete_tail = (unsigned *)(base + params.cq_off.tail);
    r->complete_mask = (unsigned *)(base + params.cq_off.ring_mask);
    r->completions = base + params.cq_off.cqes;
    return 0;
}

void ring_close(ring *r) {
    if (r->memory != MAP_FAILED)
        munmap(r->memory, r->memory_length);
    if (r->entries != MAP_FAILED)
        munmap(r->entries, r->entries_length);
    if (r->fd >= 0)
        close(r->fd);
    r->fd = -1;
    r->memory = r->entries = MAP_FAILED;
}

int ring_start(ring *r, int writing, int fd, void *data, size_t length, uint64_t offset,
               void *tag) {
    unsigned tail = *r->submit_tail;
    unsigned slot = tail & *r->submit_mask;
    struct io_uring_sqe *entry = (struct io_uring_sqe *)r->entries + slot;
    memset(entry, 0, sizeof *entry);
    entry->opcode = writing ? IORING_OP_WRITE : IORING_OP_READ;
    entry->fd = fd;
    entry->addr = (uintptr_t)data;
    entry->len = (unsigned)length;
    entry->off = offset;
    entry->user_data = (uintptr_t)tag;
    r->submit_array[slot] = slot;
    __atomic_store_n(r->submit_tail, tail + 1, __ATOMIC_RELEASE);
    int taken;
    do
        taken = enter(r, 1, 0);
    while (taken < 0 && (errno == EINTR || errno == EAGAIN || errno == EBUSY));
    if (taken != 1) {
        /* The kernel has not looked at it: take it back. */
        int error = taken < 0 ? errno : EIO;
        __atomic_store_n(r->submit_tail, tail, __ATOMIC_RELEASE);
        return error;
    }
    r->underway++;
    return 0;
}

void *ring_next(ring *r, int wait, int64_t *result) {
    for (;;) {
        unsigned head = *r->complete_head;
        if (head != __atomic_load_n(r->complete_tail, __ATOMIC_ACQUIRE)) {
            struct io_uring_cqe *done =
                (struct io_uring_cqe *)r->completions + (head & *r->complete_mask);
            void *tag = (void *)(uintptr_t)done->user_data;
            *result = done->res;
            __atomic_store_n(r->complete_head, head + 1, __ATOMIC_RELEASE);
            r->underway--;
            return tag;
        }
        if (!wait || !r->underway)
            return NULL;
        if (enter(r, 0, 1) < 0 && errno != EINTR)
            return NULL;
    }
}
