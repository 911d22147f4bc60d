# CUDA C++ to C++: the three things a header cannot do. Line numbers stay.
#
#     sed -f cu2cpp.sed program.cu > program.cpp
#
# Subset: a launch stands on one line up to its "(" and names its template arguments; a __shared__
# declaration stands on one line, inside a function, its type without commas. What the rules miss
# does not compile.

# kernel<T><<<grid, block, shared, stream>>>(
# ->   kernel<T> << cudaemu::launch(NAME, grid, block, shared, stream)(
/<<</s/NULL/nullptr/g
s/\([A-Za-z0-9_:]*\(<[^<>;]*>\)*\) *<<<\(.*\)>>> *(/\1 << cudaemu::launch(CUDAEMU_NAME(\1), \3)(/

# No blanks behind the variables of a __shared__ declaration, which lets the rules be short.
/__shared__/s/  *\([[,;]\)/\1/g

# extern __shared__ T x[];
s/extern  *__shared__  *\([^[,;]*[ *]\)\([^[,; ]*\)\[ *\];/CUDAEMU_DYNAMIC_SHARED(\1, \2);/

# __shared__ T x[n][m], y;   first all but the last variable, one by one, then the last
:next
s/__shared__  *\([^[,;]*[ *]\)\([^[,; ]*\)\([^,;]*\), */CUDAEMU_SHARED(\1, \2, \3); __shared__ \1/
t next
s/__shared__  *\([^[,;]*[ *]\)\([^[,; ]*\)\([^,;]*\);/CUDAEMU_SHARED(\1, \2, \3);/
