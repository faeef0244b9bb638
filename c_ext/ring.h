/* io_uring(7) by its system calls: a queue of writes and reads that the kernel works off. */
#ifndef HPCFT_RING_H
#define HPCFT_RING_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    int fd;
    unsigned depth;    /* how many operations can be under way */
    unsigned underway; /* how many are */
    void *memory;      /* both rings */
    size_t memory_length;
    void *entries;
    size_t entries_length;
    unsigned *submit_tail, *submit_mask, *submit_array;
    unsigned *complete_head, *complete_tail, *complete_mask;
    void *completions;
} ring;

/* Returns 0, or an errno: ENOSYS or EPERM where the kernel has, or allows, none. */
int ring_open(ring *r, unsigned depth);

void ring_close(ring *r);

/* Begin a transfer; at most `depth` may be under way. The memory must stay until it is complete.
 * Returns 0 or an errno. */
int ring_start(ring *r, int writing, int fd, void *data, size_t length, uint64_t offset, void *tag);

/* Wait for one to be complete, or, if `wait` is 0, see if one is. Returns its tag and puts what
 * pwrite or pread would have returned, an error as -errno, into `result`. NULL: none is. */
void *ring_next(ring *r, int wait, int64_t *result);

#endif
