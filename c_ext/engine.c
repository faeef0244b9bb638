#define _GNU_SOURCE
#include "engine.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "copy.h"
#include "crc32c.h"
#include "ring.h"

#define SECOND 1000000000ll

/* The part of an extent that lies in one chunk. */
typedef struct {
    unsigned char *memory;
    size_t extent;
    uint64_t begin; /* in the extent */
    uint32_t length;
    uint32_t place; /* in the task's stretch */
    uint32_t crc;
    int elsewhere;
} piece;

/* A stretch of a file that fits into a chunk. */
typedef struct task {
    struct task *next;
    job *job;
    unsigned char *chunk; /* the byte at file offset x lies at chunk[x - base] */
    uint64_t offset, base;
    uint32_t length, file;
    size_t first_piece, n_pieces;
    int in_place;  /* read straight into its one piece's memory, which is its chunk */
    int elsewhere; /* some piece is */
} task;

typedef struct {
    task *head, **tail;
} queue;

/* Tasks, by number, from the next nobody has taken to the end. */
typedef struct {
    size_t next, end;
} stretch;

struct job {
    engine *engine;
    job *next; /* in the engine's list of jobs with tasks nobody has taken */
    int writing, sync;
    int lends; /* some extent is elsewhere */
    engine_file *files;
    uint32_t n_files;
    piece *pieces;
    task *tasks;
    uint32_t *checksums;
    stretch *stretches; /* of the tasks; one a mover when reading, else one */
    size_t n_pieces, n_tasks, n_extents, n_stretches;
    /* From here on under the engine's lock. */
    size_t taken;    /* tasks taken by a copier or borrowed, or when reading taken by a mover */
    size_t copying;  /* tasks being copied or lent right now, when writing */
    size_t finished; /* tasks that are through */
    int waiting;     /* in the engine's list */
    int done, owned;
    queue arrived; /* tasks that are read and wait to be borrowed */
    size_t out;    /* that are borrowed, when reading */
    job_failure failure;
    uint64_t total, copied, moved;
};

struct engine {
    engine_options options;
    int *cpus;
    unsigned char *pool;
    unsigned char **spare; /* stack of unused chunks */
    size_t n_spare, n_chunks, least_spare;
    pthread_mutex_t lock;
    pthread_cond_t copy;              /* there may be something to copy */
    pthread_cond_t move;              /* there may be something to write or read */
    pthread_cond_t news;              /* a job has come further */
    pthread_cond_t stopped;           /* the engine is being closed */
    job *to_copy, *to_lend, *to_read; /* jobs with tasks nobody has taken, oldest first */
    queue filled;                     /* tasks that are copied and wait to be written */
    size_t copying;                   /* tasks being copied, or lent to be written, right now */
    size_t borrowers;                 /* who wait for a chunk */
    size_t movers;                    /* that have begun */
    int stop, holders; /* threads, jobs and the owner: who leaves last frees it all */
    int64_t free_at;   /* when the bandwidth allows the next write */
    int with_ring;
};

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * SECOND + t.tv_nsec;
}

/* Wait on a condition until a moment; the lock is held. Returns 0 when it is past. */
static int wait_until(engine *e, pthread_cond_t *condition, int64_t moment) {
    struct timespec t = {moment / SECOND, moment % SECOND};
    return pthread_cond_timedwait(condition, &e->lock, &t) != ETIMEDOUT;
}

/* -- queues; the lock is held ------------------------------------------------------------------ */

static void append(queue *q, task *t) {
    t->next = NULL;
    *q->tail = t;
    q->tail = &t->next;
}

/* The first, or NULL. */
static task *pop(queue *q) {
    task *t = q->head;
    if (t) {
        q->head = t->next;
        if (!q->head)
            q->tail = &q->head;
    }
    return t;
}

/* -- life ------------------------------------------------------------------------------------ */

static void engine_free(engine *e) {
    if (e->pool)
        munmap(e->pool, e->options.pool);
    pthread_mutex_destroy(&e->lock);
    pthread_cond_destroy(&e->copy);
    pthread_cond_destroy(&e->move);
    pthread_cond_destroy(&e->news);
    pthread_cond_destroy(&e->stopped);
    free(e->spare);
    free(e->cpus);
    free(e);
}

/* Give up a hold on the engine; the lock is held before, and not after. */
static void engine_leave(engine *e) {
    int last = --e->holders == 0;
    pthread_mutex_unlock(&e->lock);
    if (last)
        engine_free(e);
}

static void close_files(job *j) {
    for (uint32_t i = 0; j->files && i < j->n_files; i++) {
        engine_file *file = &j->files[i];
        if (file->buffered >= 0)
            close(file->buffered);
        if (file->direct >= 0)
            close(file->direct);
        *file = (engine_file){-1, -1};
    }
}

static void job_destroy(job *j) {
    close_files(j);
    free(j->files);
    free(j->pieces);
    free(j->tasks);
    free(j->stretches);
    free(j->checksums);
    free(j);
}

/* -- jobs, as the threads see them; the lock is held ------------------------------------------ */

static void fail(job *j, int number, uint32_t file, const char *doing) {
    if (!j->failure.number)
        j->failure = (job_failure){number, file, doing};
}

/* Where the engine lists it. */
static job **list_of(job *j) {
    engine *e = j->engine;
    if (!j->writing)
        return &e->to_read;
    return j->lends ? &e->to_lend : &e->to_copy;
}

static void unlist(job *j) {
    if (!j->waiting)
        return;
    job **at = list_of(j);
    while (*at != j)
        at = &(*at)->next;
    *at = j->next;
    j->waiting = 0;
}

static void job_over(job *j) {
    for (size_t i = 0; !j->failure.number && i < j->n_pieces; i++) {
        piece *p = &j->pieces[i];
        uint32_t *sum = &j->checksums[p->extent];
        *sum = crc32c_combine(*sum, p->crc, p->length);
    }
    j->done = 1;
    pthread_cond_broadcast(&j->engine->news);
    if (!j->owned) {
        engine *e = j->engine;
        job_destroy(j);
        e->holders--; /* not the last: this thread is one itself */
    }
}

/* Have no further task taken. Those not taken are through. */
static void abandon(job *j) {
    unlist(j);
    j->finished += j->n_tasks - j->taken;
    j->taken = j->n_tasks;
    pthread_cond_broadcast(&j->engine->news);
}

/* Where a thread takes its next task from: its own stretch, or if that is through, the longest. To
 * read several stretches side by side is faster than one on most disks, each being read in order.
 */
static stretch *stretch_for(job *j, size_t thread) {
    stretch *own = &j->stretches[thread % j->n_stretches], *longest = own;
    for (size_t i = 0; own->next == own->end && i < j->n_stretches; i++)
        if (j->stretches[i].end - j->stretches[i].next > longest->end - longest->next)
            longest = &j->stretches[i];
    return longest;
}

/* Take a task, which needs a chunk unless it is read in place. There is one to take. */
static task *take_task(job *j, stretch *from) {
    task *t = &j->tasks[from->next++];
    if (++j->taken == j->n_tasks)
        unlist(j);
    return t;
}

static unsigned char *take_chunk(engine *e) {
    unsigned char *chunk = e->spare[--e->n_spare];
    if (e->n_spare < e->least_spare)
        e->least_spare = e->n_spare;
    return chunk;
}

static void give_chunk(engine *e, task *t) {
    e->spare[e->n_spare++] = t->chunk;
    t->chunk = NULL;
    pthread_cond_signal(&e->copy);
    if (e->to_read)
        pthread_cond_signal(&e->move);
    if (e->borrowers)
        pthread_cond_broadcast(&e->news);
}

/* Flush the files if that is wanted, and let go of them: a deleted file keeps its room until then.
 * Releases the lock meanwhile. */
static void leave_files(job *j) {
    engine *e = j->engine;
    int flush = j->sync && !j->failure.number;
    pthread_mutex_unlock(&e->lock);
    int number = 0;
    uint32_t file = 0;
    for (; flush && file < j->n_files && !number; file++)
        if (fsync(j->files[file].buffered))
            number = errno;
    close_files(j);
    pthread_mutex_lock(&e->lock);
    if (number)
        fail(j, number, file - 1, "fsync");
}

/* A task is through, well or not. Ends the job if it was the last. */
static void finish(task *t, int number, const char *doing) {
    job *j = t->job;
    engine *e = j->engine;
    if (t->chunk && !t->in_place)
        give_chunk(e, t);
    if (number) {
        fail(j, number, t->file, doing);
        abandon(j);
    } else if (!j->failure.number) {
        j->moved += t->length;
    }
    if (++j->finished < j->n_tasks) {
        if (e->borrowers)
            pthread_cond_broadcast(&e->news);
        return;
    }
    leave_files(j);
    job_over(j);
}

/* A failed job: what has been read and nobody has borrowed is through. */
static void drop_arrived(job *j) {
    task *t;
    while ((t = pop(&j->arrived)))
        finish(t, 0, "");
}

/* -- threads ---------------------------------------------------------------------------------- */

static void settle_down(engine *e, int niceness) {
    if (e->options.n_cpus) {
        cpu_set_t set;
        CPU_ZERO(&set);
        for (size_t i = 0; i < e->options.n_cpus; i++)
            CPU_SET(e->cpus[i], &set);
        /* A processor that has gone is no reason not to save. */
        (void)pthread_setaffinity_np(pthread_self(), sizeof set, &set);
    }
    if (niceness) {
        /* On Linux this is the thread's alone. */
        int tid = (int)syscall(SYS_gettid);
        (void)setpriority(PRIO_PROCESS, (id_t)tid, getpriority(PRIO_PROCESS, 0) + niceness);
    }
}

static unsigned char *data_at(task *t, uint32_t place) {
    return t->chunk + (t->offset - t->base) + place;
}

/* Bring into the chunk what is in memory that can be reached. */
static void fill(task *t) {
    for (size_t i = 0; i < t->n_pieces; i++) {
        piece *p = &t->job->pieces[t->first_piece + i];
        if (p->memory)
            copy_past_cache(data_at(t, p->place), p->memory, p->length);
        else if (!p->elsewhere)
            memset(data_at(t, p->place), 0, p->length);
    }
}

/* Take the next task of a job that writes, to fill it; the lock is held. */
static task *begin_copy(job *j) {
    engine *e = j->engine;
    task *t = take_task(j, j->stretches);
    t->chunk = take_chunk(e);
    j->copying++;
    e->copying++;
    return t;
}

/* It is full, and can be written; the lock is held. */
static void end_copy(task *t) {
    job *j = t->job;
    engine *e = j->engine;
    e->copying--;
    j->copied += t->length;
    if (--j->copying == 0)
        pthread_cond_broadcast(&e->news);
    append(&e->filled, t);
    /* All movers of an engine being closed, for they stay until the last copy is there. */
    if (e->stop)
        pthread_cond_broadcast(&e->move);
    else
        pthread_cond_signal(&e->move);
}

static void *copier(void *argument) {
    engine *e = argument;
    settle_down(e, 0);
    pthread_mutex_lock(&e->lock);
    for (;;) {
        while (!e->stop && !(e->to_copy && e->n_spare))
            pthread_cond_wait(&e->copy, &e->lock);
        if (e->stop)
            break;
        task *t = begin_copy(e->to_copy);
        pthread_mutex_unlock(&e->lock);
        fill(t);
        pthread_mutex_lock(&e->lock);
        end_copy(t);
    }
    engine_leave(e);
    return NULL;
}

static void checksum(task *t) {
    for (size_t i = 0; i < t->n_pieces; i++) {
        piece *p = &t->job->pieces[t->first_piece + i];
        p->crc = crc32c(0, data_at(t, p->place), p->length);
    }
}

static void hand_out(task *t) {
    if (t->in_place)
        return;
    for (size_t i = 0; i < t->n_pieces; i++) {
        piece *p = &t->job->pieces[t->first_piece + i];
        if (p->memory)
            copy_past_cache(p->memory, data_at(t, p->place), p->length);
    }
}

/* Have [from, to) of the file transferred through the page cache. Returns 0 or an errno. */
static int move_buffered(task *t, uint64_t from, uint64_t to) {
    job *j = t->job;
    int fd = j->files[t->file].buffered;
    uint64_t begin = from;
    while (from < to) {
        unsigned char *data = t->chunk + (from - t->base);
        ssize_t moved = j->writing ? pwrite(fd, data, to - from, (off_t)from)
                                   : pread(fd, data, to - from, (off_t)from);
        if (moved < 0 && errno == EINTR)
            continue;
        if (moved < 0)
            return errno;
        if (moved == 0)
            return j->writing ? EIO : ENODATA;
        from += (uint64_t)moved;
    }
    if (j->writing && to - begin >= ENGINE_PAGE)
        /* Have the disk begin now rather than at the fsync. */
        (void)sync_file_range(fd, (off64_t)begin, (off64_t)(to - begin), SYNC_FILE_RANGE_WRITE);
    return 0;
}

/* The part of the task that can be moved past the page cache: whole pages, when reading also those
 * the task only touches. Empty (from == to) if there is none. */
static void direct_part(const task *t, uint64_t *from, uint64_t *to) {
    const uint64_t mask = ENGINE_PAGE - 1;
    uint64_t end = t->offset + t->length;
    if (t->job->writing) {
        *from = (t->offset + mask) & ~mask;
        *to = end & ~mask;
    } else {
        *from = t->offset & ~mask;
        *to = (end + mask) & ~mask;
    }
    if (*from >= *to || t->job->files[t->file].direct < 0)
        *from = *to = t->offset;
}

/* Go on with the direct part, `result` being what the kernel has said of [from, to). */
static int move_direct(task *t, uint64_t from, uint64_t to, int64_t result) {
    job *j = t->job;
    int fd = j->files[t->file].direct;
    uint64_t end = t->offset + t->length;
    for (;;) {
        if (result == -EINTR || result == -EAGAIN)
            result = 0;
        else if (result == -EINVAL || result == -EOPNOTSUPP)
            /* The file system allows O_DIRECT in open() only, or wants more than our alignment. */
            return move_buffered(t, from > t->offset ? from : t->offset, to < end ? to : end);
        else if (result < 0)
            return (int)-result;
        else if (result == 0)
            return j->writing ? EIO : ENODATA;
        from += (uint64_t)result;
        if (from >= to || (!j->writing && from >= end))
            return 0;
        if (from % ENGINE_PAGE)
            return move_buffered(t, from, to < end ? to : end);
        unsigned char *data = t->chunk + (from - t->base);
        ssize_t moved = j->writing ? pwrite(fd, data, to - from, (off_t)from)
                                   : pread(fd, data, to - from, (off_t)from);
        result = moved < 0 ? -errno : moved;
        if (result == -EINTR || result == -EAGAIN)
            continue;
    }
}

/* What is left of a task when the direct part is through. Returns 0 or an errno. */
static int move_rest(task *t) {
    uint64_t from, to, end = t->offset + t->length;
    direct_part(t, &from, &to);
    int number = 0;
    if (from == to)
        number = move_buffered(t, t->offset, end);
    else if (t->job->writing) {
        if (from > t->offset)
            number = move_buffered(t, t->offset, from);
        if (!number && end > to)
            number = move_buffered(t, to, end);
    }
    if (!number && !t->job->writing) {
        checksum(t);
        hand_out(t);
    }
    return number;
}

/* Wait until the bandwidth allows so many bytes more; the lock is held. */
static void throttle(engine *e, uint32_t length) {
    if (!e->options.bandwidth)
        return;
    int64_t start = now();
    if (e->free_at > start)
        start = e->free_at;
    e->free_at = start + (int64_t)((double)length / (double)e->options.bandwidth * SECOND);
    while (!e->stop && now() < start)
        wait_until(e, &e->stopped, start);
}

/* What was to be done with a task's file is; the lock is held. */
static void moved(task *t, int number) {
    job *j = t->job;
    if (!j->writing && t->elsewhere && !number && !j->failure.number) {
        append(&j->arrived, t);
        pthread_cond_broadcast(&j->engine->news);
        return;
    }
    finish(t, number, j->writing ? "write" : "read");
}

/* The next task for a mover, with a chunk; the lock is held. */
static task *next_to_move(engine *e, size_t mover) {
    task *t = pop(&e->filled);
    if (t)
        return t;
    job *j = e->to_read;
    if (!j)
        return NULL;
    stretch *from = stretch_for(j, mover);
    if (!j->tasks[from->next].in_place && !e->n_spare)
        return NULL;
    t = take_task(j, from);
    if (!t->in_place)
        t->chunk = take_chunk(e);
    return t;
}

/* Move a task, or begin to: with a ring, what can be left to the kernel is. The lock is held. */
static void start_moving(engine *e, ring *r, task *t) {
    job *j = t->job;
    if (j->failure.number) {
        finish(t, 0, "");
        return;
    }
    if (j->writing)
        throttle(e, t->length);
    pthread_mutex_unlock(&e->lock);
    if (j->writing)
        checksum(t);
    uint64_t from, to;
    direct_part(t, &from, &to);
    int number = 0;
    if (from < to) {
        unsigned char *data = t->chunk + (from - t->base);
        int fd = j->files[t->file].direct;
        if (r && ring_start(r, j->writing, fd, data, to - from, from, t) == 0) {
            pthread_mutex_lock(&e->lock);
            return;
        }
        number = move_direct(t, from, to, -EAGAIN);
    }
    if (!number)
        number = move_rest(t);
    pthread_mutex_lock(&e->lock);
    moved(t, number);
}

/* A transfer that the ring had is complete. The lock is held. */
static void end_moving(engine *e, task *t, int64_t result) {
    pthread_mutex_unlock(&e->lock);
    uint64_t from, to;
    direct_part(t, &from, &to);
    int number = move_direct(t, from, to, result);
    if (!number)
        number = move_rest(t);
    pthread_mutex_lock(&e->lock);
    moved(t, number);
}

static void *mover(void *argument) {
    engine *e = argument;
    settle_down(e, e->options.niceness);
    ring own, *r = NULL;
    if (e->with_ring && ring_open(&own, e->options.depth) == 0)
        r = &own;
    pthread_mutex_lock(&e->lock);
    const size_t me = e->movers++;
    for (;;) {
        task *t = NULL;
        if (!r || r->underway < r->depth)
            t = next_to_move(e, me);
        if (t) {
            start_moving(e, r, t);
        } else if (r && r->underway) {
            int64_t result;
            pthread_mutex_unlock(&e->lock);
            t = ring_next(r, 1, &result);
            pthread_mutex_lock(&e->lock);
            if (t)
                end_moving(e, t, result);
        } else if (e->stop && !e->copying) {
            break;
        } else {
            pthread_cond_wait(&e->move, &e->lock);
        }
    }
    if (r)
        ring_close(r);
    engine_leave(e);
    return NULL;
}

/* -- the engine ------------------------------------------------------------------------------- */

static int start_threads(engine *e) {
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    /* Signals are for the threads of the program. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int number = 0;
    for (int i = 0; i < e->options.copiers + e->options.movers && !number; i++) {
        pthread_t thread;
        e->holders++;
        number = pthread_create(&thread, &attributes, i < e->options.copiers ? copier : mover, e);
        if (number)
            e->holders--;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return number;
}

int engine_new(const engine_options *options, engine **made) {
    engine *e = calloc(1, sizeof *e);
    if (!e)
        return ENOMEM;
    e->options = *options;
    e->holders = 1;
    e->filled.tail = &e->filled.head;
    pthread_mutex_init(&e->lock, NULL);
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&e->copy, NULL);
    pthread_cond_init(&e->move, NULL);
    pthread_cond_init(&e->news, &clock);
    pthread_cond_init(&e->stopped, &clock);
    pthread_condattr_destroy(&clock);
    e->n_chunks = e->n_spare = e->least_spare = options->pool / options->chunk;
    e->spare = calloc(e->n_chunks, sizeof *e->spare);
    e->cpus = calloc(options->n_cpus + 1, sizeof *e->cpus);
    void *pool =
        mmap(NULL, options->pool, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    e->pool = pool == MAP_FAILED ? NULL : pool;
    if (!e->spare || !e->cpus || !e->pool) {
        engine_free(e);
        return ENOMEM;
    }
    /* Fewer page faults; only advice. A forked child has no use for it. */
    (void)madvise(e->pool, options->pool, MADV_HUGEPAGE);
    (void)madvise(e->pool, options->pool, MADV_DONTFORK);
    if (options->n_cpus)
        memcpy(e->cpus, options->cpus, options->n_cpus * sizeof *e->cpus);
    e->options.cpus = NULL;
    /* The first to be used is the first of the pool. */
    for (size_t i = 0; i < e->n_chunks; i++)
        e->spare[i] = e->pool + (e->n_chunks - 1 - i) * options->chunk;
    if (options->depth) {
        ring probe;
        e->with_ring = ring_open(&probe, options->depth) == 0;
        if (e->with_ring)
            ring_close(&probe);
    }
    pthread_mutex_lock(&e->lock);
    int number = start_threads(e);
    pthread_mutex_unlock(&e->lock);
    if (number) {
        engine_close(e);
        return number;
    }
    *made = e;
    return 0;
}

void engine_close(engine *e) {
    pthread_mutex_lock(&e->lock);
    e->stop = 1;
    job **lists[] = {&e->to_copy, &e->to_lend, &e->to_read};
    for (int i = 0; i < 3; i++)
        while (*lists[i]) {
            job *j = *lists[i];
            fail(j, ECANCELED, 0, "write");
            abandon(j);
            if (j->finished == j->n_tasks)
                job_over(j);
        }
    pthread_cond_broadcast(&e->copy);
    pthread_cond_broadcast(&e->move);
    pthread_cond_broadcast(&e->stopped);
    engine_leave(e);
}

const char *engine_backend(const engine *e) {
    return e->with_ring ? "io_uring" : "threads";
}

void *engine_pool(const engine *e, size_t *size) {
    *size = e->options.pool;
    return e->pool;
}

size_t engine_peak(engine *e) {
    pthread_mutex_lock(&e->lock);
    size_t most = e->n_chunks - e->least_spare;
    pthread_mutex_unlock(&e->lock);
    return most * e->options.chunk;
}

/* -- jobs, as their owner sees them ------------------------------------------------------------ */

/* How many bytes of an extent, from its beginning, can be read to where they belong without going
 * through a chunk: past the page cache, whole pages that lie in memory as they do in the file. */
static uint64_t straight(const job *j, const engine_file *files, const engine_extent *x) {
    if (j->writing || !x->memory)
        return 0;
    if (files[x->file].direct < 0)
        return x->length;
    if ((uintptr_t)x->memory % ENGINE_PAGE || x->offset % ENGINE_PAGE)
        return 0;
    return x->length & ~(uint64_t)(ENGINE_PAGE - 1);
}

/* Cut the extents into tasks and pieces; with j->tasks NULL only count them. */
static void cut(job *j, const engine_file *files, const engine_extent *extents, size_t chunk) {
    size_t n_tasks = 0, n_pieces = 0;
    uint64_t end = 0; /* of the task being made */
    uint32_t file = 0;
    int open = 0; /* more may join that task */
    for (size_t i = 0; i < j->n_extents; i++) {
        const engine_extent *x = &extents[i];
        const uint64_t in_place = straight(j, files, x);
        uint64_t offset = x->offset, done = 0;
        while (done < x->length) {
            const int alone = done < in_place;
            uint64_t room = chunk - offset % chunk;
            uint64_t left = (alone ? in_place : x->length) - done;
            uint32_t length = (uint32_t)(left < room ? left : room);
            unsigned char *memory = x->memory ? (unsigned char *)x->memory + done : NULL;
            if (!open || alone || file != x->file || end != offset || offset % chunk == 0) {
                uint64_t base = alone ? offset : offset & ~(uint64_t)(ENGINE_PAGE - 1);
                if (j->tasks)
                    j->tasks[n_tasks] = (task){.job = j,
                                               .chunk = alone ? memory : NULL,
                                               .offset = offset,
                                               .base = base,
                                               .file = x->file,
                                               .first_piece = n_pieces,
                                               .in_place = alone};
                n_tasks++;
                file = x->file;
                open = !alone;
            }
            if (j->tasks) {
                task *t = &j->tasks[n_tasks - 1];
                j->pieces[n_pieces] = (piece){.memory = memory,
                                              .extent = i,
                                              .begin = done,
                                              .length = length,
                                              .place = t->length,
                                              .elsewhere = x->elsewhere};
                t->elsewhere |= x->elsewhere;
                t->length += length;
                t->n_pieces++;
            }
            n_pieces++;
            offset += length;
            done += length;
            end = offset;
        }
        if (!j->tasks) {
            j->total += x->length;
            j->lends |= x->elsewhere;
        }
    }
    j->n_tasks = n_tasks;
    j->n_pieces = n_pieces;
}

static void enlist(job *j) {
    engine *e = j->engine;
    job **at = list_of(j);
    while (*at)
        at = &(*at)->next;
    *at = j;
    j->waiting = 1;
    pthread_cond_broadcast(j->writing ? &e->copy : &e->move);
}

/* Fill in the job's own descriptors. Returns 0 or an errno. */
static int duplicate(job *j, const engine_file *files) {
    for (uint32_t i = 0; i < j->n_files; i++)
        j->files[i] = (engine_file){-1, -1};
    for (uint32_t i = 0; i < j->n_files; i++) {
        j->files[i].buffered = fcntl(files[i].buffered, F_DUPFD_CLOEXEC, 0);
        if (j->files[i].buffered < 0)
            return errno;
        if (files[i].direct < 0)
            continue;
        j->files[i].direct = fcntl(files[i].direct, F_DUPFD_CLOEXEC, 0);
        if (j->files[i].direct < 0)
            return errno;
    }
    return 0;
}

static int prepare(job *j, const engine_file *files, const engine_extent *extents) {
    cut(j, files, extents, j->engine->options.chunk);
    j->files = calloc(j->n_files + 1, sizeof *j->files);
    j->tasks = calloc(j->n_tasks + 1, sizeof *j->tasks);
    j->pieces = calloc(j->n_pieces + 1, sizeof *j->pieces);
    j->checksums = calloc(j->n_extents + 1, sizeof *j->checksums);
    j->n_stretches = j->writing ? 1 : (size_t)j->engine->options.movers;
    j->stretches = calloc(j->n_stretches, sizeof *j->stretches);
    if (!j->files || !j->tasks || !j->pieces || !j->checksums || !j->stretches)
        return ENOMEM;
    for (size_t i = 0; i < j->n_stretches; i++)
        j->stretches[i] =
            (stretch){j->n_tasks * i / j->n_stretches, j->n_tasks * (i + 1) / j->n_stretches};
    cut(j, files, extents, j->engine->options.chunk);
    return duplicate(j, files);
}

int job_begin(engine *e, int writing, const engine_file *files, uint32_t n_files,
              const engine_extent *extents, size_t n_extents, int sync, job **made) {
    job *j = calloc(1, sizeof *j);
    if (!j)
        return ENOMEM;
    j->engine = e;
    j->writing = writing;
    j->sync = sync;
    j->owned = 1;
    j->arrived.tail = &j->arrived.head;
    j->n_files = n_files;
    j->n_extents = n_extents;
    int number = prepare(j, files, extents);
    if (number) {
        job_destroy(j);
        return number;
    }
    pthread_mutex_lock(&e->lock);
    e->holders++;
    if (j->n_tasks) {
        enlist(j);
    } else {
        leave_files(j);
        job_over(j);
    }
    pthread_mutex_unlock(&e->lock);
    *made = j;
    return 0;
}

static int reached(const job *j, job_stage stage) {
    if (j->done)
        return 1;
    return stage == JOB_COPIED && j->writing && j->taken == j->n_tasks && !j->copying;
}

int job_wait(job *j, job_stage stage, int64_t nanoseconds) {
    engine *e = j->engine;
    int64_t deadline = now() + nanoseconds;
    pthread_mutex_lock(&e->lock);
    int is;
    while (!(is = reached(j, stage)) && wait_until(e, &e->news, deadline)) {
    }
    pthread_mutex_unlock(&e->lock);
    return is;
}

/* The next chunk to lend, if there is one; the lock is held. */
static task *lend(job *j) {
    if (!j->writing)
        return pop(&j->arrived);
    return j->taken < j->n_tasks && j->engine->n_spare ? begin_copy(j) : NULL;
}

/* Whether no chunk will come to be lent; the lock is held. */
static int lent_all(const job *j) {
    if (j->writing)
        return j->taken == j->n_tasks;
    return j->failure.number || j->finished + j->out == j->n_tasks;
}

loan *job_borrow(job *j, int64_t nanoseconds, int *over) {
    engine *e = j->engine;
    int64_t deadline = now() + nanoseconds;
    task *t;
    pthread_mutex_lock(&e->lock);
    e->borrowers++;
    for (;;) {
        if (!j->writing && j->failure.number)
            drop_arrived(j);
        t = lend(j);
        *over = !t && lent_all(j);
        if (t || *over || !wait_until(e, &e->news, deadline))
            break;
    }
    e->borrowers--;
    if (t && !j->writing)
        j->out++;
    pthread_mutex_unlock(&e->lock);
    if (t && j->writing)
        fill(t);
    return t;
}

void job_give_back(loan *lent) {
    job *j = lent->job;
    engine *e = j->engine;
    pthread_mutex_lock(&e->lock);
    if (j->writing) {
        end_copy(lent);
    } else {
        j->out--;
        finish(lent, 0, "");
    }
    pthread_mutex_unlock(&e->lock);
}

unsigned char *loan_memory(loan *lent, size_t *length) {
    *length = lent->length;
    return data_at(lent, 0);
}

int loan_look(const loan *lent, size_t number, loan_piece *found) {
    for (size_t i = 0; i < lent->n_pieces; i++) {
        const piece *p = &lent->job->pieces[lent->first_piece + i];
        if (p->elsewhere && !number--) {
            *found = (loan_piece){p->extent, p->begin, p->place, p->length};
            return 1;
        }
    }
    return 0;
}

job_progress job_look(job *j) {
    pthread_mutex_lock(&j->engine->lock);
    job_progress progress = {j->total, j->copied, j->moved, j->done};
    pthread_mutex_unlock(&j->engine->lock);
    return progress;
}

job_failure job_failed(job *j) {
    pthread_mutex_lock(&j->engine->lock);
    job_failure failure = j->failure;
    pthread_mutex_unlock(&j->engine->lock);
    return failure;
}

uint32_t job_checksum(job *j, size_t extent) {
    return j->checksums[extent];
}

static void cancel(job *j) {
    if (j->finished == j->n_tasks)
        return;
    fail(j, ECANCELED, 0, j->writing ? "write" : "read");
    abandon(j);
    if (j->finished == j->n_tasks)
        job_over(j);
    else
        drop_arrived(j);
}

void job_cancel(job *j) {
    pthread_mutex_lock(&j->engine->lock);
    cancel(j);
    pthread_mutex_unlock(&j->engine->lock);
}

void job_free(job *j) {
    engine *e = j->engine;
    pthread_mutex_lock(&e->lock);
    cancel(j);
    while (!reached(j, JOB_COPIED))
        pthread_cond_wait(&e->news, &e->lock);
    if (!j->done) {
        j->owned = 0; /* the thread that ends it destroys it */
        pthread_mutex_unlock(&e->lock);
        return;
    }
    job_destroy(j);
    engine_leave(e);
}
