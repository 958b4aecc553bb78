import { styled } from "@/lib/styled"

export const Pagination = styled("nav", "flex gap-1")
export const PaginationLink = styled("a", "rounded border px-2 py-1 text-sm")
