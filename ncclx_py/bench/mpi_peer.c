/* One collective of MPI, timed and checked as ncclx_py/bench/timing.py and cases.py do it; compiled and run by mpi.py.

   mpi_peer COLLECTIVE ITERS WARMUP CHECK ROWS...

   Each ROWS is one size: for all_to_all and all_to_all_v what each rank sends to each of the others, as a comma-separated
   list by sender; for all_gather and reduce_scatter the elements of one rank; else the elements of the vector. Elements are
   floats. Rank 0 prints one line per size: the number of wrong elements, then each rank's samples in seconds. */

#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_INNER = 50 };
static const double SAMPLE_SECONDS = 0.05, LONG = 0.3;

static int rank, size;
static const char *collective;
static float *given, *result;
static int *sent, *received, *sent_at, *received_at; /* elements by peer, and where they start */
static int count;                                    /* elements of the vector, or of one rank's part */

static int is(const char *name) { return strcmp(collective, name) == 0; }
static long long mixed(long long i) { return (i * 2654435761LL) >> 13; }
static float value(long long i, int weight) { return (float)((mixed(i) & 3) + weight * ((mixed(i) >> 2) & 3)); }
static float total(long long i) { return (float)((mixed(i) & 3) * size + size * (size - 1) / 2 * ((mixed(i) >> 2) & 3)); }
static int pair(int source, int target) { return (source + 7 * target) % (size + 1); }

static void call(void) {
    if (is("all_reduce")) MPI_Allreduce(given, result, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
    else if (is("reduce")) MPI_Reduce(given, result, count, MPI_FLOAT, MPI_SUM, 0, MPI_COMM_WORLD);
    else if (is("broadcast")) MPI_Bcast(result, count, MPI_FLOAT, 0, MPI_COMM_WORLD);
    else if (is("all_gather")) MPI_Allgather(given, count, MPI_FLOAT, result, count, MPI_FLOAT, MPI_COMM_WORLD);
    else if (is("reduce_scatter")) MPI_Reduce_scatter_block(given, result, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
    else if (is("all_to_all")) MPI_Alltoall(given, sent[0], MPI_FLOAT, result, sent[0], MPI_FLOAT, MPI_COMM_WORLD);
    else MPI_Alltoallv(given, sent, sent_at, MPI_FLOAT, result, received, received_at, MPI_FLOAT, MPI_COMM_WORLD);
}

static int exchanges(void) { return is("all_to_all") || is("all_to_all_v"); }

/* Calls once on fresh values, and counts the wrong elements on this rank. */
static long long wrong(void) {
    long long bad = 0, i;
    int peer;
    if (exchanges()) {
        for (peer = 0; peer < size; peer++)
            for (i = 0; i < sent[peer]; i++) given[sent_at[peer] + i] = value(i, pair(rank, peer));
        memset(result, 0x7f, sizeof(float) * (received_at[size - 1] + received[size - 1]));
        call();
        for (peer = 0; peer < size; peer++)
            for (i = 0; i < received[peer]; i++) bad += result[received_at[peer] + i] != value(i, pair(peer, rank));
        return bad;
    }
    if (is("all_gather")) {
        for (i = 0; i < count; i++) given[i] = value(i, rank);
        call();
        for (i = 0; i < (long long)count * size; i++) bad += result[i] != value(i % count, (int)(i / count));
        return bad;
    }
    for (i = 0; i < (long long)count * (is("reduce_scatter") ? size : 1); i++)
        (is("broadcast") ? result : given)[i] = value(i, rank);
    call();
    if (is("reduce") && rank) return 0;
    for (i = 0; i < count; i++) {
        long long at = is("reduce_scatter") ? (long long)rank * count + i : i;
        bad += result[i] != (is("broadcast") ? value(at, 0) : total(at));
    }
    return bad;
}

static double timed(int repeats) {
    double start = MPI_Wtime();
    for (int i = 0; i < repeats; i++) call();
    return (MPI_Wtime() - start) / repeats;
}

/* Sets the counts of one size and allocates for it. */
static void prepare(const char *rows) {
    size_t in = 0, out = 0;
    char *at = (char *)rows;
    count = atoi(rows);
    for (int peer = 0; peer < size; peer++) {
        received[peer] = exchanges() ? (int)strtol(at, &at, 10) : 0;
        if (*at == ',') at++;
    }
    for (int peer = 0; peer < size; peer++) {
        sent[peer] = received[rank];
        sent_at[peer] = (int)in, received_at[peer] = (int)out;
        in += sent[peer], out += received[peer];
    }
    if (!exchanges()) in = out = (size_t)count * (is("all_gather") || is("reduce_scatter") ? size : 1);
    given = malloc(sizeof(float) * (in + 1)), result = malloc(sizeof(float) * (out + 1));
}

int main(int argc, char **argv) {
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    if (argc < 6) MPI_Abort(MPI_COMM_WORLD, 2);
    collective = argv[1];
    int iters = atoi(argv[2]), warmup = atoi(argv[3]), check = atoi(argv[4]);
    int **tables[] = {&sent, &received, &sent_at, &received_at};
    for (int i = 0; i < 4; i++) *tables[i] = calloc(size, sizeof(int));
    double *samples = malloc(sizeof(double) * iters), *all = malloc(sizeof(double) * iters * size);
    for (int which = 5; which < argc; which++) {
        prepare(argv[which]);
        long long bad = check ? wrong() : 0, sum = 0;
        for (int i = 1; i < warmup; i++) call();
        MPI_Barrier(MPI_COMM_WORLD);
        double longest, mine = timed(1);
        MPI_Allreduce(&mine, &longest, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
        int inner = longest >= LONG ? 0 : (int)(SAMPLE_SECONDS / longest) + 1;
        if (inner > MOST_INNER) inner = MOST_INNER;
        for (int i = 0; i < iters; i++) {
            MPI_Barrier(MPI_COMM_WORLD);
            if (inner) call();
            samples[i] = timed(inner ? inner : 1);
        }
        bad += check ? wrong() : 0;
        MPI_Reduce(&bad, &sum, 1, MPI_LONG_LONG, MPI_SUM, 0, MPI_COMM_WORLD);
        MPI_Gather(samples, iters, MPI_DOUBLE, all, iters, MPI_DOUBLE, 0, MPI_COMM_WORLD);
        if (rank == 0) {
            printf("result %lld", sum);
            for (int i = 0; i < iters * size; i++) printf(" %.9g", all[i]);
            printf("\n");
            fflush(stdout);
        }
        free(given), free(result);
    }
    MPI_Finalize();
    return 0;
}
