import { styled } from "@/lib/styled"

export const Breadcrumb = styled("nav", "text-sm text-muted-foreground")
export const BreadcrumbItem = styled("span", "after:content-['/'] last:after:content-none")
