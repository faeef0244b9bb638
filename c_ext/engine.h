/*
 * Moves memory to files and back in threads of its own; knows nothing of Python.
 *
 * Writing:  source --copiers--> staging pool --movers: checksum, write, fsync--> file
 * Reading:  file --movers: read, checksum--> staging pool --the same mover--> destination
 *
 * What is in memory that no thread here can reach, such as that of a GPU, the job's owner moves
 * between there and the pool; the chunks are lent to it.
 *
 * The pool is all the memory an engine uses for data. Copiers wait when it is full. What is moved
 * travels in chunks: stretches of a file that end where the next multiple of the chunk size begins,
 * whatever number of extents they consist of.
 */
#ifndef HPCFT_ENGINE_H
#define HPCFT_ENGINE_H

#include <stddef.h>
#include <stdint.h>

/* What direct transfers are aligned to, in files and in memory. */
#define ENGINE_PAGE 4096u

typedef struct engine engine;
typedef struct job job;

typedef struct {
    size_t pool;  /* bytes, a multiple of chunk */
    size_t chunk; /* bytes, a multiple of ENGINE_PAGE */
    int copiers, movers;
    unsigned depth;     /* transfers each mover has under way with io_uring; 0: without */
    uint64_t bandwidth; /* bytes a second over all writes; 0: as fast as it goes */
    int niceness;       /* of the movers, added to the process's */
    const int *cpus;    /* where its threads may run */
    size_t n_cpus;      /* 0: anywhere */
} engine_options;

typedef struct {
    int buffered;
    int direct; /* the same file opened with O_DIRECT; -1 if it cannot be */
} engine_file;

/* A stretch of a file and of memory. When writing, memory NULL stands for zeros; when reading, for
 * bytes to skip. */
typedef struct {
    void *memory;
    uint64_t offset, length;
    uint32_t file;
    int elsewhere; /* the owner moves it, see job_borrow; memory is NULL */
} engine_extent;

typedef enum { JOB_COPIED, JOB_DONE } job_stage;

/* A stretch of the pool, lent to a job's owner. */
typedef struct task loan;

/* What of an extent that is elsewhere lies in a loan. */
typedef struct {
    size_t extent;
    uint64_t begin;         /* in the extent */
    uint32_t place, length; /* in the loan */
} loan_piece;

/* What went wrong first; number 0: nothing. */
typedef struct {
    int number; /* an errno; ENODATA: the file is too short */
    uint32_t file;
    const char *doing; /* "write", "read" or "fsync" */
} job_failure;

typedef struct {
    uint64_t total, copied, moved; /* bytes */
    int done;
} job_progress;

/* Returns 0 or an errno. */
int engine_new(const engine_options *options, engine **made);

/* Let all threads end once they have done what they have in hand. Does not wait for them; jobs not
 * yet finished fail with ECANCELED. Nobody may use the engine after that, jobs still may be. */
void engine_close(engine *e);

/* "io_uring" or "threads". */
const char *engine_backend(const engine *e);

/* All of the pool. */
void *engine_pool(const engine *e, size_t *size);

/* Bytes of the pool that have been in use at the same time, at most. */
size_t engine_peak(engine *e);

/*
 * Begin to move. Extents are to be in order of file and offset and must not overlap. The job has
 * its own duplicates of the descriptors; the memory must stay until it is copied, when reading
 * until the job is done. With `sync`, files are flushed to disk after the last byte. Returns 0 or
 * an errno.
 */
int job_begin(engine *e, int writing, const engine_file *files, uint32_t n_files,
              const engine_extent *extents, size_t n_extents, int sync, job **made);

/* Wait for a stage to be reached, at most so many nanoseconds. Returns whether it is. A job that
 * has failed reaches both. */
int job_wait(job *j, job_stage stage, int64_t nanoseconds);

/*
 * Lend the owner of a job with extents that are elsewhere the next chunk: when writing, to be
 * filled; when reading, to be emptied. Waits for it at most so many nanoseconds. `over` says
 * whether none will come any more. Returns NULL if there is none. Each is to be given back, before
 * the job is freed.
 */
loan *job_borrow(job *j, int64_t nanoseconds, int *over);

/* When writing, what it holds is written, unless the job has failed. */
void job_give_back(loan *lent);

/* The memory of a loan, and its length. */
unsigned char *loan_memory(loan *lent, size_t *length);

/* One of what is elsewhere of a loan; from number 0. Returns 0 if there are not as many. */
int loan_look(const loan *lent, size_t number, loan_piece *found);

job_progress job_look(job *j);

job_failure job_failed(job *j);

/* CRC-32C of an extent. Only for a job that is done and has not failed. */
uint32_t job_checksum(job *j, size_t extent);

/* Leave out what has not been begun; the job fails with ECANCELED if there is such. */
void job_cancel(job *j);

/* The owner has no further use for it: cancels it, and returns as soon as its memory is not used
 * any more, which for a job that reads is when it is done. */
void job_free(job *j);

#endif
